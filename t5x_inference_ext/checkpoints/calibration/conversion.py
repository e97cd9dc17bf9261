"""A conversion that rounds the matrices by GPTQ first."""

from collections.abc import Collection, Iterator
import dataclasses
from typing import Any

from t5x_inference_ext.checkpoints.calibration.calibration import Calibration
from t5x_inference_ext.checkpoints.calibration.rows import read_calibration
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion, ConversionProgress
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions, Report
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.quantization.formats import weight_format, with_bits


class CalibratedConversion(Conversion):
  """A conversion whose source is, after a calibration, a checkpoint of quantized matrices."""

  def __init__(
    self,
    source: Checkpoint,
    text: str,
    options: ConvertOptions,
    work: WorkDirectory,
    progress: ConversionProgress,
  ) -> None:
    """Plan a conversion.

    Args:
      source: The checkpoint to read.
      text: The file to calibrate with (rows.read_calibration).
      options: The options.
      work: The work directory, which also keeps rounded layers.
      progress: Called after every matrix and every block.

    Raises:
      UserError: The options round nothing, or exclude a calibration; the source is quantized; or
        the text can't be used.
    """
    _check_options(source, text, options)
    self._float_source = source
    weights = with_bits(options.weights, options.bits or '', source.config)
    self._calibration = Calibration(
      source,
      read_calibration(text, source),
      weights,
      options.search == 'mse',
      work.calibration,
      progress,
    )
    super().__init__(self._calibration.rounded, options, work.payload, progress)

  def description(self) -> Iterator[str]:
    yield self._calibration.description()
    yield from super().description()

  def report(
    self, path: str, slices: Collection[dict[str, Any]] = (), finished: bool = True
  ) -> Report:
    nbytes = sum(tensor.nbytes for tensor in self._float_source.tensors.values())
    report = super().report(path, slices, finished)
    return dataclasses.replace(report, source=self._float_source, source_bytes=nbytes)

  def _convert_shard(self, work: WorkDirectory) -> None:
    self._calibration.run()
    super()._convert_shard(work)

  def _has_results(self, work: WorkDirectory) -> bool:
    return self._calibration.layers_done > 0 or super()._has_results(work)

  def _errors(self, slices: Collection[dict[str, Any]]) -> dict[str, RoundingError]:
    errors = super()._errors(slices)
    return {**errors, **self._calibration.errors} if errors else errors


def _check_options(source: Checkpoint, text: str, options: ConvertOptions) -> None:
  """Raise UserError unless a source can be calibrated with these options."""
  if options.format != 'serving' or not weight_format(options.weights).quantized:
    raise UserError(
      f'calibration={text} is for int8 and int4 weights of a serving checkpoint, not for '
      f'{options.weights if options.format == "serving" else options.format}'
    )
  if options.scale_search is not None:
    raise UserError(
      f'scale_search={options.scale_search} is for rounding without a calibration, which finds '
      'scales itself: give one of the two'
    )
  if options.num_shards != 1:
    raise UserError(
      f'a conversion with calibration={text} is done by one process, not by num_shards='
      f'{options.num_shards}: its layers are rounded one after the other'
    )
  if weight_format(source.weights).scaled:
    raise UserError(
      f'{source.path} holds {source.weights} weights, which are rounded already: calibrate the '
      'float checkpoint that they were made from'
    )
