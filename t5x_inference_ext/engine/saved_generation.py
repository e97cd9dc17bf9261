"""A whole generation (prefill and decode) saved as one executable: `infer` runs it per batch.

Before a file is loaded, it is compared with the model and options of the run.
"""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh

from t5x_inference_ext.compiler_options import take_int4
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.saved_program import SavedError, damaged_header, header_text
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.quantization.formats import weight_format

# Field of a GenerationShape -> its least valid value. JSON null stands for None, where the field
# may be None.
_LEAST = {
  'batch': 1,
  'prompt': 0,
  'context': 1,
  'max_new_tokens': 1,
  'eos_id': -(2**31),
  'max_length': 1,
}


@dataclasses.dataclass(frozen=True)
class GenerationShape:
  """The limits that are fixed when a generation is compiled, besides the model.

  Attributes:
    batch: int. B.
    prompt: int. Length in tokens that prompts are padded to, BOS not counted.
    context: int. S, the positions of each row's cache.
    max_new_tokens: int. Maximum number of new tokens of each row.
    sampling: SamplingParams. How tokens are chosen.
    eos_id: int. The token that ends a row.
    max_length: int or None. Maximum number of tokens of prompt and output together
      (engine.static_batch).
  """

  batch: int
  prompt: int
  context: int
  max_new_tokens: int
  sampling: SamplingParams = SamplingParams()
  eos_id: int = 1
  max_length: int | None = None

  def options(self) -> dict[str, Any]:
    """Return the static arguments of engine.static_batch.generate_batch."""
    return {
      'sampling': self.sampling,
      'max_new_tokens': self.max_new_tokens,
      'eos_id': self.eos_id,
      'cache_size': self.context,
      'max_length': self.max_length,
    }


def describe_run(
  config: ModelConfig,
  weights: str,
  layouts: tuple[Any, Any],
  dtype: str,
  cache: str,
  stacked: bool,
  run: GenerationShape,
) -> dict[str, Any]:
  """Return the JSON-ready description of the settings that a saved generation was compiled for.

  Args:
    config: ModelConfig. The model.
    weights: str. Format of the matrices (quantization.formats); float ones have the compute dtype.
    layouts: tuple of two layouts, of prefill and of decode.
    dtype: str. The dtype of activations and float weights.
    cache: str. Dtype of the KV cache: a float dtype or 'int8'.
    stacked: bool. Whether one array holds all layers.
    run: GenerationShape. The limits.
  """
  prefill, decode = map(str, layouts)
  return {
    'phase': 'generate',
    'model': config.to_dict(),
    'weights': weight_format(weights).on_devices(dtype),
    'prefill_layout': prefill,
    'decode_layout': decode,
    'dtype': dtype,
    'stacked': stacked,
    'cache': 'as dtype' if cache == dtype else cache,
    **dataclasses.asdict(run),
  }


@dataclasses.dataclass(frozen=True)
class SavedGeneration:
  """A saved generation, checked against a model but not loaded yet.

  Attributes:
    path: str. The file.
    run: GenerationShape. The limits that it was compiled for.
    described: dict. The settings that it was compiled for, as describe_run returns them.
  """

  path: str
  run: GenerationShape
  described: dict[str, Any]
  _loaded: list[jax.stages.Compiled] = dataclasses.field(
    default_factory=list, compare=False, repr=False
  )

  @classmethod
  def open(
    cls, path: str | os.PathLike, model: Model, weights: str, stacked: bool
  ) -> 'SavedGeneration':
    """Check a file's header against a model, without running anything in the file.

    Args:
      path: str or path. The file.
      model: Model. The model that the generation must have been compiled for.
      weights: str. Dtype of the weights, as in describe_run.
      stacked: bool. Whether one array holds all layers.

    Raises:
      SavedError: The file is not a generation, or is one for other versions, devices, model or
        layouts. The message names the first difference.
    """
    run = _shape(path, _description(path))
    wanted = describe_run(
      model.config,
      weights,
      (model.prefill_layout, model.decode_layout),
      model.dtype,
      model.cache_dtype,
      stacked,
      run,
    )
    saved_program.check_header(path, model.mesh, wanted)
    return cls(os.fspath(path), run, wanted)

  def check_run(self, run: GenerationShape) -> None:
    """Raise SavedError, naming the first difference, if the program has other limits."""
    saved_program.refuse_differences(
      self.path, self.described, {**self.described, **dataclasses.asdict(run)}
    )

  def load(
    self, function: Callable[..., Any], arguments: tuple[Any, ...], mesh: Mesh
  ) -> jax.stages.Compiled:
    """Return the executable, a function of `arguments`; load it once (see saved_program.load)."""
    if not self._loaded:
      loaded = saved_program.load(self.path, function, arguments, mesh, self.described)
      self._loaded.append(take_int4(loaded))
    return self._loaded[0]


def check_saved_run(path: str | os.PathLike, **wanted: Any) -> None:
  """Check that fields of a saved generation's GenerationShape have given values.

  Args:
    path: str or path. The file.
    **wanted: Field name -> the value that it must have.

  Raises:
    SavedError: The file is not a generation, or a field has another value.
  """
  saved = dataclasses.asdict(_shape(path, _description(path)))
  saved_program.refuse_differences(path, {name: saved[name] for name in wanted}, wanted)


def _description(path: str | os.PathLike) -> dict[str, Any]:
  described = saved_program.read_program_header(path)['description']
  if described.get('phase') != 'generate':
    raise SavedError(
      f'{os.fspath(path)} holds a {header_text(described.get("phase"))} program: infer runs whole '
      'generations, made with `python -m t5x_inference_ext.precompile --phase=generate --save=FILE`'
    )
  return described


def _shape(path: str | os.PathLike, described: dict[str, Any]) -> GenerationShape:
  """Return the limits that a file describes.

  Raises:
    SavedError: A limit is missing or out of range.
  """
  for field in dataclasses.fields(GenerationShape):
    if field.name not in described:
      raise damaged_header(path, f'has no {field.name}')
  limits = {name: described[name] for name in _LEAST}
  for name, value in limits.items():
    if value is None and name == 'max_length':
      continue
    if type(value) is not int or not _LEAST[name] <= value < 2**31:
      raise damaged_header(path, f'has {name} {value!r}')
  try:
    return GenerationShape(**limits, sampling=SamplingParams(**described['sampling']))
  except (RequestError, TypeError, OverflowError) as e:
    raise damaged_header(path, f'has invalid sampling parameters ({e})') from e
