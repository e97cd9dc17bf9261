"""The last slice of a conversion: scales that the source has."""

import functools

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import Rectangle
from t5x_inference_ext.checkpoints.conversion.not_finite import check_finite
from t5x_inference_ext.checkpoints.conversion.pipeline import PipelineJob
from t5x_inference_ext.checkpoints.conversion.slice_work import SliceContext, WrittenSums
from t5x_inference_ext.quantization.formats import weight_format


class ScalesWork:
  """The last slice: the scales of weights quantized in the source, if any. A PipelineWork."""

  def __init__(self, context: SliceContext) -> None:
    self._context, self._sums, self._started = context, WrittenSums(context), False

  def may_start(self) -> bool:
    """Return True: scales need no memory for blocks."""
    return True

  def jobs(self) -> list[PipelineJob] | None:
    """Return the jobs of the single step, one per tensor."""
    source = self._context.source
    if self._started:
      self._sums.finish(len(self._context.plan.slices), {})
      return None
    self._started = True
    names = params.scales(source.config, weight_format(source.weights).scaled)
    return [functools.partial(self._scale, name) for name in names]

  def _scale(self, name: str) -> None:
    source, output = self._context.source, self._context.output
    values = source.tensors[name].read()  # [L, out], 90 MB in all for palm_540b; or [V]
    check_finite(source, name, values, 0)
    if name in params.scales(source.config, weight_format(output.weights).scaled):
      values = values.reshape(-1, values.shape[-1])
      layers, columns = values.shape
      rectangle = Rectangle((0, layers), (0, 1), (0, columns))
      self._sums.put(list(output.placements(name, rectangle, values[:, None])))
