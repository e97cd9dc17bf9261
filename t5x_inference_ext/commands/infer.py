r"""Generate or score text with a serving checkpoint, or directly with a T5X checkpoint.

A run over a file of prompts, one JSON object a line, {"prompt": TEXT or [token ids]}:

  python -m t5x_inference_ext.infer --checkpoint=examples/palm_tiny/checkpoint_1000 \
      --prompts=examples/prompts.jsonl --output=/tmp/completions.jsonl \
      --max_new_tokens=48 --temperature=0 --dtype=float32 --mesh=1x1x1

Output rows have the order of the prompts, and the form {"prompt", "completion", "tokens", "score"}.
`tokens` are the generated ids, EOS included if the row ended with it; `score` is the sum of their
log-probabilities. Other fields of a row are kept. To sample, with a seed for every row from --seed
and the row's index:

  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl \
      --temperature=0.8 --top_k=40 --top_p=0.95 --seed=7 --vocabulary=FILE.model

Four samples of each prompt, sharing its prefill, each up to its first blank line, with the
log-probabilities of its tokens and of the three most likely at each step:

  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl \
      --temperature=0.8 --num_decodes=4 --stop=$'\n\n' --top_log_probs=3

A row can have options of its own:

  {"prompt": ..., "sampling": {"temperature": 0.7, "stop": ["END"], "seed": 3}}

To score given completions, {"prompt": ..., "completion": ...}; the output of a run that generated
text is such a file:

  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl \
      --mode=score

A run over a seqio task, with the features, rows and file names of T5X's infer (comments at the top
of the gin file list all macros):

  python -m t5x_inference_ext.infer --gin_file=t5x_inference_ext/configs/runs/infer.gin \
      --gin.CHECKPOINT_PATH=\"DIR\" --gin.INFER_OUTPUT_DIR=\"DIR\" \
      --gin.MIXTURE_OR_TASK_NAME=\"my_task\" --gin.MIXTURE_OR_TASK_MODULE=\"my_tasks\" \
      --gin.TASK_FEATURE_LENGTHS="{'inputs': 48, 'targets': 16}"

Each phase has its layout (docs/layouts.md). To see how a pair of layouts splits a model over a
mesh, before anything is loaded:

  python -m t5x_inference_ext.infer --checkpoint=DIR --mesh=2x2x2 --batch_size=8 \
      --prefill_layout=wg_xyz/batch --decode_layout=ws_2d/batch --explain_layout

Several processes, each with some devices of one mesh, are started with equal flags except
--process_id (process 0 writes the output):

  python -m t5x_inference_ext.infer ... \
      --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

To run the request of a receipt again (docs/infer.md); the exit code is 1 if the tokens differ from
the receipt's:

  python -m t5x_inference_ext.infer --checkpoint=DIR --replay=receipt.json

Errors in files, flags, mesh or checkpoint are reported before the weights are loaded. On CPU,
XLA_FLAGS=--xla_force_host_platform_device_count=8 simulates eight devices.
"""

from collections.abc import Callable, Iterator
import dataclasses

from absl import flags as absl_flags

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints.conventions import CONVENTION_NAMES, Conventions
from t5x_inference_ext.commands import cli, option_flags, sampling_flags
from t5x_inference_ext.compilation_cache import CacheOptions, use_compilation_cache
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.runs import loading, prompts_file
from t5x_inference_ext.runs.infer_options import InferOptions, PromptsFiles
from t5x_inference_ext.runs.job import Job
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.runs.receipt import EngineSetting
from t5x_inference_ext.runs.receipt_file import read_receipt
from t5x_inference_ext.runs.replay import replay
from t5x_inference_ext.text_files import check_extra

EQUAL, DIFFERENT = 0, 1  # exit codes of a replay
_REPLAY_TAKES = (
  *('checkpoint', 'vocabulary', 'scan_layers', 'batch_size', 'adapters'),
  *CONVENTION_NAMES,
)
EXPLAINED_PROMPT = 512  # prompt tokens that --explain_layout assumes without --cache_length


def define_flags(flags: absl_flags.FlagValues) -> None:
  """Define the command's flags, in the order of --help."""
  option_flags.define_options(flags, InferOptions, skip=CONVENTION_NAMES)
  option_flags.define_options(flags, Conventions)
  option_flags.define_options(flags, PromptsFiles)
  sampling_flags.define_sampling(flags)
  option_flags.define_flag(
    flags,
    'explain_layout',
    bool,
    False,
    'Print the sharding of every tensor, and stop. --prompts and --output are not needed. The '
    'mesh may have more devices than there are. Also works with gin flags.',
    group='Sharding, memory and compilation',
  )
  option_flags.define_flag(
    flags,
    'replay',
    str | None,
    None,
    'File of a receipt: run its request again and compare the tokens. --mesh, layouts and dtypes '
    'are those of the receipt unless they are given; --prompts and --output are not needed.',
    group='Required',
  )
  option_flags.define_options(flags, CacheOptions)
  option_flags.define_options(flags, ProcessOptions)


def run(argv: list[str] | None = None) -> int:
  """Run the command; return its exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    flags = session.parse()
    if flags.replay is not None:
      session.code = EQUAL if _replay(flags) else DIFFERENT
      return session.code
    for job in _jobs(flags):
      with job.running():
        while not job.work.finished:
          job.keep(job.work.step())
        job.write()
  return session.code


def _replay(flags: absl_flags.FlagValues) -> bool:
  """Run the request of a receipt again; return whether the tokens are equal."""
  if cli.uses_gin(flags):
    raise UserError('--replay takes no gin flags: the receipt says what to run')
  option_flags.check_given(flags, 'checkpoint')
  setting = [field.name for field in dataclasses.fields(EngineSetting)]
  allowed = (*_REPLAY_TAKES, *setting)
  for name in option_flags.option_names(InferOptions, PromptsFiles, SamplingParams):
    if name not in allowed and flags[name].present:
      raise UserError(f'--{name} does not go with --replay: the receipt says what to run')
  distributed.initialize(option_flags.read_options(flags, ProcessOptions))
  with distributed.together():
    receipt = read_receipt(flags.replay)
  options = dataclasses.replace(
    option_flags.read_options(flags, InferOptions),
    **{n: getattr(receipt.setting, n) for n in setting if not flags[n].present},
  )
  use_compilation_cache(option_flags.read_options(flags, CacheOptions), print_on_main)
  return replay(receipt, options, flags.vocabulary)


def _jobs(flags: absl_flags.FlagValues) -> Iterator[Job]:
  """Yield the jobs to run: one for a prompts file, or one for each task of a mixture."""
  processes = option_flags.read_options(flags, ProcessOptions)
  cache = option_flags.read_options(flags, CacheOptions)
  if cli.uses_gin(flags):
    yield from _task_run(flags, processes, cache)()
    return
  options = _infer_options(flags)
  if flags.explain_layout:
    prompt = EXPLAINED_PROMPT if options.max_prompt is None else options.max_prompt
    loading.explain_layout(options, prompt)
    return
  files = option_flags.read_options(flags, PromptsFiles)
  distributed.initialize(processes)
  use_compilation_cache(cache, print_on_main)
  yield from prompts_file.prepare(options, files)


def _infer_options(flags: absl_flags.FlagValues) -> InferOptions:
  """Return the options of a run over prompts; raise UserError for missing or wrong ones."""
  needed = ('checkpoint',) if flags.explain_layout else ('checkpoint', 'prompts', 'output')
  option_flags.check_given(flags, *needed)
  return option_flags.read_options(
    flags, InferOptions, sampling=sampling_flags.read_sampling(flags)
  )


def _task_run(
  flags: absl_flags.FlagValues, processes: ProcessOptions, cache: CacheOptions
) -> Callable[[], Iterator[Job]]:
  """Return a function that starts a run over a seqio task, with all arguments bound by gin."""
  plain = option_flags.option_names(InferOptions, PromptsFiles, SamplingParams)
  cli.check_unmixed(flags, plain, 'CHECKPOINT_PATH=\\"DIR\\"', 'configs/runs/infer.gin')
  check_extra('seqio', 'a run over a task needs seqio and tensorflow', 'seqio', 'tensorflow')
  distributed.initialize(processes)
  config_text = cli.parse_gin(flags)
  if not flags.explain_layout:
    use_compilation_cache(cache, print_on_main)
  from t5x_inference_ext.runs import task_run  # imports TensorFlow, which takes seconds

  return cli.configure(task_run.infer, config_text=config_text, explain_layout=flags.explain_layout)
