"""A whole generation as one program: what `infer` runs for a batch, and what a saved one is compared with."""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.model.transformer import Model


@dataclasses.dataclass(frozen=True)
class GenerationShape:
  """What is fixed when a generation is compiled, beside the model.

  Attributes:
    batch: B.
    prompt: tokens that prompts are padded to, BOS not counted.
    context: S, the positions of each row's cache.
    max_new_tokens, eos_id, max_length: see engine.static_batch.
    sampler: how tokens are chosen.
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
  """What a saved generation was compiled for, JSON-ready.

  Args:
    config: the model.
    weights: 'int8' or 'bfloat16'; others are what the compute dtype makes of them.
    layouts: of prefill and of decode.
    dtype: of activations and float weights.
    cache: what the KV cache holds, a float's dtype or 'int8'.
    stacked: whether one array holds all layers.
    run: the rest.
  """
  prefill, decode = map(str, layouts)
  return {
    'phase': 'generate',
    'model': config.to_dict(),
    'weights': 'int8' if weights == 'int8' else dtype,
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
    path: the file.
    run: what it was compiled for.
    described: that, and the model and layouts.
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
    """Reads what a file says of itself; nothing in it is run.

    Raises:
      SavedError: not a generation, or one of other versions, devices, model or layouts, naming the first difference.
    """
    said = _read(path)
    fields = {f.name: said[f.name] for f in dataclasses.fields(GenerationShape)}
    run = GenerationShape(**{**fields, 'sampling': SamplingParams(**fields['sampling'])})
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
    """Raises SavedError for a run that it was not compiled for, naming the first difference."""
    saved_program.refuse_differences(
      self.path, self.described, {**self.described, **dataclasses.asdict(run)}
    )

  def load(
    self, function: Callable[..., Any], arguments: tuple[Any, ...], mesh: Mesh
  ) -> jax.stages.Compiled:
    """The executable, a function of these arguments, loaded once; see saved.load."""
    if not self._loaded:
      self._loaded.append(saved_program.load(self.path, function, arguments, mesh, self.described))
    return self._loaded[0]


def check_options(path: str | os.PathLike, **wanted: Any) -> None:
  """Raises SavedError for a file that is no generation, or one with another value of a Run's field than is wanted."""
  said = _read(path)
  saved_program.refuse_differences(path, {name: said[name] for name in wanted}, wanted)


def _read(path) -> dict[str, Any]:
  said = saved_program.read_program_header(path)['description']
  if said.get('phase') != 'generate':
    raise saved_program.SavedError(
      f'{os.fspath(path)} holds a {said.get("phase")} program: infer runs whole generations, made '
      'with `python -m t5x_inference_ext.precompile --phase=generate --save=FILE`'
    )
  return said
