"""What a checkpoint says about text, as attributes of the checkpoint."""

from collections.abc import Mapping

from t5x_inference_ext.checkpoints.readers.public_model import SourceText
from t5x_inference_ext.text.chat_template import ChatTemplate
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.vocabulary import Vocabulary


class WithText:
  """Base of a checkpoint that may say something about text.

  Attributes:
    text: What it says, or None.
    source_text: What the files of a public model say, whose vocabulary may be unknown; or None.
  """

  text: TextSettings | None
  source_text: SourceText | None

  @property
  def vocabulary(self) -> Vocabulary | None:
    """The vocabulary, parsed at its first use; None if it is not known."""
    return self.text.vocabulary if self.text else None

  @property
  def bos_id(self) -> int | None:
    """The id that is put in front of a prompt; None: none is.

    Where nothing is known it is 0, as T5X always has it, but for a public model: it takes ids as
    they are.
    """
    if self.text:
      return self.text.bos_id
    return None if self.source_text else 0

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The ids that end a row."""
    if self.text:
      return self.text.end_ids
    return self.source_text.eos_ids if self.source_text else (1,)

  @property
  def chat_template(self) -> ChatTemplate | None:
    """The chat template; None if there is none."""
    return self.text.chat if self.text else None

  @property
  def generation_defaults(self) -> Mapping[str, float]:
    """Sampling options that the model's maker recommends, by name."""
    return self.text.generation_defaults if self.text else {}
