"""The T5X adapter: the only part of the package that imports t5x and flax.

gin binds three classes in t5x.infer (configs/t5x/infer.gin): `models.InferenceModel`,
`partitioning.InferencePartitioner` and `checkpoints.InferenceCheckpointManager`.
`interactive.InferenceInteractiveModel` replaces the class of t5x.interactive_model.
"""
