"""What a checkpoint says about text, as attributes of the checkpoint."""

from collections.abc import Mapping

from t5x_inference_ext.text.chat_template import ChatTemplate
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.vocabulary import Vocabulary


class WithText:
  """Base of a checkpoint that may say something about text.

  Attributes:
    text: What it says; None: nothing is known but what T5X always does, BOS 0 and EOS 1.
  """

  text: TextSettings | None

  @property
  def vocabulary(self) -> Vocabulary | None:
    """The vocabulary, parsed at its first use; None if it is not known."""
    return self.text.vocabulary if self.text else None

  @property
  def bos_id(self) -> int | None:
    """The id that is put in front of a prompt; None: none is."""
    return self.text.bos_id if self.text else 0

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The ids that end a row."""
    return self.text.end_ids if self.text else (1,)

  @property
  def chat_template(self) -> ChatTemplate | None:
    """The chat template; None if there is none."""
    return self.text.chat if self.text else None

  @property
  def generation_defaults(self) -> Mapping[str, float]:
    """Sampling options that the model's maker recommends, by name."""
    return self.text.generation_defaults if self.text else {}
