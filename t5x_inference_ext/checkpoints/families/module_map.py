"""Maps the names of a public model's matrices, which its adapters use, to canonical tensors."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.families.family import FamilyModel
from t5x_inference_ext.checkpoints.families.tensors import column_order
from t5x_inference_ext.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ModuleMap:
  """Modules of transformers that hold a model's matrices.

  Attributes:
    modules: Canonical matrix -> path of its module; {} stands for the layer's index.
    fused: Order of rows in a module that holds several matrices; see FamilyModel.
    interleaved: Whether rotary positions rotate neighbouring dimensions of a head.
    query_factor: Factor from the source's queries to canonical ones.
    embedding_scale: Factor by which the source's embedding is multiplied.
  """

  modules: Mapping[str, str]
  fused: str = ''
  interleaved: bool = False
  query_factor: float = 1.0
  embedding_scale: float = 1.0

  @classmethod
  def of(cls, model: FamilyModel) -> 'ModuleMap':
    """Return the map of a model in transformers' names."""
    matrices = [n for n, p in params.parameters(model.config).items() if p.kind == 'matrix']
    modules = {name: model.modules[name] for name in matrices}
    factor = model.factor('query')
    return cls(modules, model.fused, model.interleaved, factor, model.embedding_scale)

  def matrices(self, path: str) -> tuple[str, ...]:
    """Return the canonical matrices in a module ({} for the layer's index), in canonical order."""
    return tuple(name for name, module in self.modules.items() if module == path)

  def order(self, config: ModelConfig, name: str) -> npt.NDArray[np.int64] | None:
    """Return the module's output index of each column of a matrix; None: they are equal."""
    return column_order(config, name, self.fused, self.interleaved)

  def to_dict(self) -> dict[str, Any]:
    """Return the fields as a JSON-ready dict; from_dict is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Any) -> 'ModuleMap | None':
    """Return the map that to_dict returned; None if `fields` is not such a dict."""
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or set(fields) != names:
      return None
    modules = fields['modules']
    texts = isinstance(modules, dict) and all(isinstance(path, str) for path in modules.values())
    return cls(**fields) if texts else None
