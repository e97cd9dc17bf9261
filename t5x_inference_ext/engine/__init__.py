"""The engine: requests in, tokens out."""

from t5x_inference_ext._moved import renamed

__getattr__ = renamed(
  __name__,
  {
    'Engine': 't5x_inference_ext.Engine',
    'Completion': 't5x_inference_ext.engine.engine.Completion',
  },
)
