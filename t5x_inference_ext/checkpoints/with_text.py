"""What a checkpoint says about text, as attributes of the checkpoint."""

from collections.abc import Mapping

from t5x_inference_ext.text.chat_template import ChatTemplate
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.vocabulary import Vocabulary


class WithText:
  """Base of a checkpoint.

  Attributes:
    text: What the checkpoint says about text.
  """

  text: TextSettings

  @property
  def vocabulary(self) -> Vocabulary | None:
    """The vocabulary, parsed at its first use; None if it is not known."""
    return self.text.vocabulary

  @property
  def bos_id(self) -> int | None:
    """The id that is put in front of a prompt; None: none is."""
    return self.text.bos_id

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The ids that end a row."""
    return self.text.end_ids

  @property
  def chat_template(self) -> ChatTemplate | None:
    """The chat template; None if there is none."""
    return self.text.chat

  @property
  def generation_defaults(self) -> Mapping[str, float]:
    """Sampling options that the model's maker recommends, by name."""
    return self.text.generation_defaults
