r"""Serve a checkpoint over HTTP, with the API that OpenAI's clients speak.

  python -m t5x_inference_ext.serve --checkpoint=DIR --port=8000

It compiles all programs first, then prints `ready on http://127.0.0.1:8000`. Then, for example:

  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \
      -d '{"prompt": "def main(", "max_tokens": 16}'

Only this machine can connect to that address. To let other machines connect, with API keys:

  python -m t5x_inference_ext.serve --checkpoint=DIR --host=0.0.0.0 --api_key_file=keys.txt

All options are also gin macros, which comments at the top of the gin file list:

  python -m t5x_inference_ext.serve --gin_file=t5x_inference_ext/configs/runs/serve.gin \
      --gin.CHECKPOINT_PATH=\"DIR\" --gin.PORT=8000

Several processes, each with some devices of one mesh, are started with equal flags except
--process_id (process 0 takes the requests):

  python -m t5x_inference_ext.serve ... \
      --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

Needs the extra `server`. docs/server.md has the routes and their fields.
"""

from typing import Any

from absl import flags as absl_flags

from t5x_inference_ext import distributed
from t5x_inference_ext.commands import cli, option_flags
from t5x_inference_ext.compilation_cache import CacheOptions
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.text_files import check_extra

_MODULES = ('starlette', 'uvicorn', 'pydantic', 'prometheus_client')


def define_flags(flags: absl_flags.FlagValues) -> None:
  """Define the command's flags, in the order of --help."""
  from t5x_inference_ext.server.options import NOT_SERVED, ServerOptions

  option_flags.define_options(flags, ServerOptions)
  option_flags.define_options(flags, InferOptions, skip=NOT_SERVED)
  option_flags.define_options(flags, CacheOptions)
  option_flags.define_options(flags, ProcessOptions)


def run(argv: list[str] | None = None) -> int:
  """Run the command; return its exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    flags = session.parse()
    check_extra('server', 'serving needs starlette and uvicorn', *_MODULES)
    _serve(flags)
  return session.code


def _serve(flags: absl_flags.FlagValues) -> None:
  from t5x_inference_ext.server.launch import run_server
  from t5x_inference_ext.server.options import NOT_SERVED, ServerOptions

  cache = option_flags.read_options(flags, CacheOptions)
  processes = option_flags.read_options(flags, ProcessOptions)
  if cli.uses_gin(flags):
    plain = option_flags.option_names(InferOptions, ServerOptions)
    names = [name for name in plain if name not in NOT_SERVED]
    cli.check_unmixed(flags, names, 'CHECKPOINT_PATH=\\"DIR\\"', 'configs/runs/serve.gin')
    distributed.initialize(processes)
    cli.parse_gin(flags)
    cli.configure(run_server, options_of_cache=cache)()
    return
  option_flags.check_given(flags, 'checkpoint')
  options: dict[str, Any] = {
    field.name: flags[field.name].value
    for kind in (InferOptions, ServerOptions, ProcessOptions)
    for field in option_flags.option_fields(kind, skip=NOT_SERVED)
  }
  run_server(options_of_cache=cache, **options)
