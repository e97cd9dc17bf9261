"""Reading and writing checkpoints: any supported format in, canonical tensors out."""

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint

__all__ = ['Checkpoint', 'open_checkpoint']
