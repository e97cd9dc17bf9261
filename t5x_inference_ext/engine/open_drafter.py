"""Construction of drafters: of n-grams, or of a draft model with its checkpoint."""

from typing import Any

from t5x_inference_ext.engine.draft_model import load_draft_model
from t5x_inference_ext.engine.drafting import Drafter
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.speculation import Speculation


def open_drafter(speculation: Speculation | None, model: Model) -> tuple[Drafter | None, Any]:
  """Return a drafter and its weights on the mesh; None for a missing drafter or weights.

  Args:
    speculation: The kind of drafts; None: no drafts.
    model: The model that the drafts are for.

  Raises:
    UserError: The draft model's checkpoint can't be read, or does not fit the model or the mesh.
  """
  if speculation is None:
    return None, None
  if speculation.kind == 'ngram':
    return NgramDrafter(speculation.most), None
  assert speculation.path is not None
  return load_draft_model(speculation.path, speculation.most, model)
