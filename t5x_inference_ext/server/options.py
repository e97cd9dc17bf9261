"""Options of the serve command: each field defines a flag, a gin parameter and their checks."""

import dataclasses

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import check_options, option

# Options of the infer command that a server does not have: requests carry them, or they don't
# apply.
NOT_SERVED = (
  'max_new_tokens',
  'mode',
  'num_decodes',
  'seed',
  'stop',
  'token_log_probs',
  'top_log_probs',
  'cache_length',
  'executable',
  'adapter',
  'batching',
)
_HTTP, _TEXT, _LOAD, _SAFETY = 'HTTP', 'Text', 'Load', 'Safety'


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """Options of a server, in addition to its engine's (runs.infer_options.InferOptions).

  Raises:
    RequestError: A value is out of its range.
  """

  port: int = option(8000, help='Port to listen at; 0: any free port.', group=_HTTP, least=0)
  host: str = option(
    '127.0.0.1',
    help='Address to listen at. 127.0.0.1 accepts requests only from this machine, and checks '
    'their Host header; 0.0.0.0 accepts requests from all networks: give --api_key_file then.',
    group=_HTTP,
  )
  allowed_host: tuple[str, ...] = option(
    (),
    help='Another allowed value of the Host header, for example of a proxy. May be repeated. If '
    'one is given, the header is checked at every address.',
    group=_HTTP,
  )
  model_name: str | None = option(
    None,
    help="Name of the model in requests and answers. By default the last part of the checkpoint's "
    'path.',
    group=_HTTP,
  )
  max_length: int = option(
    2048,
    help='Maximum number of tokens of a prompt and its answer together, BOS included.',
    group=_TEXT,
    least=2,
  )
  vocabulary: str | None = option(
    None,
    help='`bytes`, or the path of a SentencePiece .model file or of a tokenizer.json. By default '
    "the checkpoint's own, else bytes for a model of 384 rows.",
    group=_TEXT,
  )
  max_waiting_requests: int = option(
    256,
    help='Maximum number of prompts that wait for a slot. More are refused with status 429.',
    group=_LOAD,
    least=1,
  )
  max_waiting_tokens: int = option(
    1_000_000,
    help='Maximum number of tokens of waiting prompts (of a text, its bytes). More are refused '
    'with 429.',
    group=_LOAD,
    least=1,
  )
  request_timeout: int = option(
    600,
    help='Seconds after which a request ends, unless it asks for less with `timeout`.',
    group=_LOAD,
    least=1,
  )
  drain_seconds: int = option(
    30,
    help='Seconds that requests may go on after SIGTERM. Requests that are left then end with an '
    'error. A second SIGTERM ends all requests at once.',
    group=_LOAD,
    least=0,
  )
  max_body_bytes: int = option(
    4 * 2**20, help='Maximum number of bytes of a request body.', group=_SAFETY, least=1
  )
  api_key: str | None = option(
    None,
    help='Key that clients must send. Other users of this machine can see it; --api_key_file is '
    'safer.',
    group=_SAFETY,
  )
  api_key_file: str | None = option(
    None, help='File with keys that clients may send, one per line.', group=_SAFETY
  )
  log_prompts: bool = option(
    False, help='Write prompts and answers into the request log.', group=_SAFETY
  )

  def __post_init__(self) -> None:
    check_options(self)
    if self.port > 65535:
      raise RequestError(f'port must be 0 to 65535, got {self.port}')
