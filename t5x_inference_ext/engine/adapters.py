"""The adapters of an engine: their names, numbers and soft prompts, as requests choose them."""

from collections.abc import Collection, Hashable, Mapping, Sequence
import dataclasses
import os
import re

import numpy as np
import numpy.typing as npt

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter
from t5x_inference_ext.checkpoints.adapters.read import read_adapter
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.errors import RequestError, name_list, printable
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

_NAME = re.compile(r'[\w./:@+-]{1,200}')


@dataclasses.dataclass(frozen=True)
class AdapterSalt:
  """A key of cached prefixes: the request's own salt, and the adapter."""

  salt: Hashable
  adapter: str


@dataclasses.dataclass(frozen=True)
class AdapterNames:
  """Names of the loaded adapters.

  Attributes:
    prompts: Name -> token ids of the adapter's soft prompt, from V on; () if it has none. Adapter i
      of the mapping has the number i + 1 in rows; 0 is no adapter.
    checksums: Name -> CRC-32 of the adapter's values.
  """

  prompts: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, adapters: Mapping[str, Adapter], vocab_size: int) -> 'AdapterNames':
    """Number the tokens of all soft prompts, in the order in which they are loaded."""
    prompts, first = {}, vocab_size
    for name, adapter in adapters.items():
      count = 0 if adapter.prompt is None else len(adapter.prompt)
      prompts[name] = tuple(range(first, first + count))
      first += count
    return cls(prompts, {name: adapter.crc32 for name, adapter in adapters.items()})

  def number(self, name: str | None) -> int:
    """Return the number of an adapter in rows; 0 for None.

    Raises:
      RequestError: No adapter has this name.
    """
    if name is None:
      return 0
    if name not in self.prompts:
      known = name_list(self.prompts, len(self.prompts))
      raise RequestError(
        f'no adapter {printable(name, 80)} is loaded; '
        + (f'loaded are {known}' if self.prompts else 'load one with `adapters`')
      )
    return [*self.prompts].index(name) + 1

  def prompt(self, name: str | None) -> tuple[int, ...]:
    """Return the ids of an adapter's soft prompt; () if it has none, or for None."""
    return self.prompts.get(name, ()) if name is not None else ()

  def of_rows(self, names: str | None | Sequence[str | None], count: int) -> list[str | None]:
    """Return the name of the adapter of each of `count` rows, given one for all or one for each.

    Raises:
      RequestError: No adapter has a name, or there are more or fewer names than rows.
    """
    each = [names] * count if names is None or isinstance(names, str) else list(names)
    if len(each) != count:
      raise RequestError(f'{count} prompts need one adapter for all or {count}, got {len(each)}')
    for name in each:
      self.number(name)
    return each

  def inputs(
    self, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], rows: Sequence[str | None]
  ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Put the soft prompts of rows in front of model inputs [B, T]; also return the new lengths."""
    prompts = [self.prompt(name) for name in rows]
    longest = max(map(len, prompts))
    out = np.zeros((len(rows), longest + tokens.shape[1]), np.int32)
    for row, prompt in enumerate(prompts):
      out[row, : len(prompt)] = prompt
      out[row, len(prompt) : len(prompt) + tokens.shape[1]] = tokens[row]
    return out, (lengths + np.asarray([*map(len, prompts)])).astype(np.int32)

  def weights_for(self, weights: Weights, model: Model, rows: Sequence[str | None]) -> Weights:
    """Return the weights as a pass over rows with these adapters uses them."""
    if not weights.has_adapters:
      return weights
    return weights.for_rows(programs.put(model, np.asarray([*map(self.number, rows)], np.int32))[0])

  def prompted(self, request: Request) -> Request:
    """Return a request whose tokens begin with its adapter's soft prompt.

    A request that was returned before is returned as it is.

    Raises:
      RequestError: No adapter has the request's name.
    """
    self.number(request.adapter)
    prompt = self.prompt(request.adapter)
    if request.tokens[: len(prompt)] == prompt:
      return request
    return dataclasses.replace(request, tokens=(*prompt, *request.tokens))


NO_ADAPTERS = AdapterNames()


def salt_of(request: Request) -> Hashable:
  """Return everything besides the tokens that a request's keys and values depend on."""
  return request.salt if request.adapter is None else AdapterSalt(request.salt, request.adapter)


def named_paths(values: Collection[str], chosen: str | None = None) -> dict[str, str]:
  """Return name -> path of texts NAME=PATH[,NAME=PATH...].

  Raises:
    RequestError: A text has another form, a name comes twice, or `chosen` is not among the names.
  """
  found: dict[str, str] = {}
  for each in (each for value in values for each in str(value).split(',')):
    name, _, path = each.partition('=')
    if not name or not path:
      raise RequestError(f'adapters must be NAME=PATH, got {printable(each, 80)}')
    if name in found:
      raise RequestError(f'adapters name {printable(name, 80)} twice')
    found[name] = path
  if chosen is not None and chosen not in found:
    known = name_list(found, len(found)) or 'none'
    raise RequestError(f'adapter={printable(chosen, 80)} is not among adapters, which has {known}')
  return found


def read_adapters(
  paths: Mapping[str, str | os.PathLike | Adapter], checkpoint: Checkpoint
) -> dict[str, Adapter]:
  """Read adapters by name. One that was read for this checkpoint before is returned as it is.

  Raises:
    RequestError: A name can't be used.
    CheckpointError: An adapter does not fit the model.
  """
  if not isinstance(paths, Mapping):
    raise RequestError(f'adapters must be a mapping of names to paths, got {printable(paths, 80)}')
  for name in paths:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise RequestError(
        f"an adapter can't be named {printable(name, 80)}: use letters, digits and _ . / : @ + -"
      )
  return {
    name: path if isinstance(path, Adapter) else read_adapter(path, checkpoint)
    for name, path in paths.items()
  }
