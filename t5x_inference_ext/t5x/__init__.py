"""The T5X adapter: the only part of the package that imports t5x and flax.

models.InferenceModel, partitioning.InferencePartitioner and checkpoints.InferenceCheckpointManager plug into t5x.infer
by gin (configs/t5x/infer.gin); interactive.InferenceInteractiveModel is t5x.interactive_model's class for these.
"""
