"""Construction of drafters: of n-grams, or of a draft model with its checkpoint."""

from typing import Any, NamedTuple

from t5x_inference_ext.engine.draft_model import DraftModel, load_draft_model
from t5x_inference_ext.engine.drafting import Drafter
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.speculation import Speculation


class OpenDrafter(NamedTuple):
  """A drafter, ready for use.

  Attributes:
    drafter: Makes the drafts; None: there are no drafts.
    weights: Weights of the drafter on the mesh; None if it has none.
  """

  drafter: Drafter | None = None
  weights: Any = None


class Drafters:
  """Opens drafters for a model. Keeps a draft model's weights until another one is asked for.

  Args:
    model: The model that the drafts are for.
  """

  def __init__(self, model: Model) -> None:
    self._model = model
    self._kept: tuple[str, Model, Weights] | None = None

  def open(self, speculation: Speculation | None) -> OpenDrafter:
    """Return the drafter of a kind of drafts; None: no drafts.

    Raises:
      UserError: The draft model's checkpoint can't be read, or does not fit the model or the mesh.
    """
    if speculation is None:
      return OpenDrafter()
    if speculation.kind == 'ngram':
      return OpenDrafter(NgramDrafter(speculation.most))
    path = speculation.path
    assert path is not None
    if self._kept is None or self._kept[0] != path:
      self._kept = None  # free the memory of another draft model first
      self._kept = path, *load_draft_model(path, self._model)
    _, model, weights = self._kept
    return OpenDrafter(DraftModel(model, speculation.most), weights)
