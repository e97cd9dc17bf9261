"""Chat templates: Jinja programs in checkpoints that turn a conversation into one text."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from t5x_inference_ext.errors import CheckpointError, RequestError, printable

MAX_TEMPLATE = 2**17  # maximum number of characters; the longest known template has about 20,000


class ChatTemplate:
  """A chat template. Picklable; compiled at its first use.

  A template is an untrusted program, so it runs in a sandbox and within limits (chat_sandbox.py).

  Args:
    source: The template.
    name: Name of the checkpoint, for messages.
  """

  def __init__(self, source: str, name: str = 'the checkpoint') -> None:
    self.source, self._name = source, name

  def __getstate__(self) -> dict[str, Any]:
    return {'source': self.source, '_name': self._name}

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    bos_token: str = '',
    eos_token: str = '',
    **values: Any,
  ) -> str:
    """Return a conversation as text.

    Args:
      messages: Objects with `role` and `content`, in order.
      add_generation_prompt: Whether to end the text with the header of an answer.
      tools: Descriptions of functions that the model may call.
      bos_token: Text of BOS, for templates that include it.
      eos_token: Text of the token that ends a turn, for templates that use it.
      **values: Further variables of the template.

    Raises:
      CheckpointError: The template is invalid, or exceeds a limit.
      RequestError: The template refuses these messages.
    """
    import jinja2

    from t5x_inference_ext.text import chat_sandbox

    context = {
      **values,
      'messages': messages,
      'tools': tools,
      'add_generation_prompt': add_generation_prompt,
      'bos_token': bos_token,
      'eos_token': eos_token,
    }
    chat_sandbox.start_steps()
    parts: list[str] = []
    left = chat_sandbox.MAX_SIZE
    try:
      for part in self._compiled.generate(context):
        parts.append(part)
        left -= len(part)
        if left < 0:
          raise chat_sandbox.LimitExceeded(f'writes more than {chat_sandbox.MAX_SIZE} characters')
      return ''.join(parts)
    except chat_sandbox.MessagesRefused as refused:
      raise RequestError(
        f'the chat template of {printable(self._name)} refuses these messages: '
        f'{printable(str(refused))}'
      ) from None
    except chat_sandbox.LimitExceeded as limit:
      problem = str(limit)
    except RecursionError:
      problem = 'is nested too deeply'
    except jinja2.TemplateSyntaxError as error:
      problem = f'is broken in line {error.lineno}: {error.message}'
    except Exception as error:  # a template's operations may raise anything
      problem = f'fails with {type(error).__name__}: {printable(str(error))}'
    raise CheckpointError(f'the chat template of {self._name} {problem}')

  @functools.cached_property
  def _compiled(self) -> Any:
    from t5x_inference_ext.text import chat_sandbox

    if len(self.source) > MAX_TEMPLATE:
      raise chat_sandbox.LimitExceeded(f'has more than {MAX_TEMPLATE} characters')
    return chat_sandbox.compile_template(self.source)
