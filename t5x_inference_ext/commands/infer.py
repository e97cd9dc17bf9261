"""Generates or scores text with a serving checkpoint, or straight from a T5X one.

A file of prompts, one JSON object a line, {"prompt": TEXT or [token ids]}, here on a mesh of 2 x 2 x 2 devices:

  python -m t5x_inference_ext.infer --checkpoint=examples/palm_tiny/checkpoint_1000 \\
      --prompts=examples/prompts.jsonl --output=/tmp/completions.jsonl \\
      --max_new_tokens=48 --temperature=0 --dtype=float32 --mesh=1x1x1

Rows come out in the same order: {"prompt", "completion", "tokens", "score"}; tokens are the generated ids alone (EOS
included, where it came), score is the sum of their log-probabilities. Other fields of a row are kept. Sampling, with a
seed for every row that depends on --seed and the row's place alone:

  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl \\
      --temperature=0.8 --top_k=40 --top_p=0.95 --seed=7 --vocabulary=FILE.model

Four samples of each prompt, which share its prefill, each until its first blank line, with the log-probabilities of its
tokens and of the three most likely at each step; --help has more ways to choose tokens:

  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl \\
      --temperature=0.8 --num_decodes=4 --stop=$'\\n\\n' --top_log_probs=3

A row can say itself how it is to be continued:

  {"prompt": ..., "sampling": {"temperature": 0.7, "stop": ["END"], "seed": 3}}

Scoring given completions, {"prompt": ..., "completion": ...}; the output of a generating run can be scored as it is:

  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl --mode=score

A seqio task, with the features, rows and file names of T5X's infer (see the head of the gin file for all macros):

  python -m t5x_inference_ext.infer --gin_file=t5x_inference_ext/configs/runs/infer.gin \\
      --gin.CHECKPOINT_PATH=\\"DIR\\" --gin.INFER_OUTPUT_DIR=\\"DIR\\" --gin.MIXTURE_OR_TASK_NAME=\\"my_task\\" \\
      --gin.MIXTURE_OR_TASK_MODULE=\\"my_tasks\\" --gin.TASK_FEATURE_LENGTHS="{'inputs': 48, 'targets': 16}"

Each phase has its layout (docs/layouts.md); what a pair of them does to a model on a mesh, before anything is loaded:

  python -m t5x_inference_ext.infer --checkpoint=DIR --mesh=2x2x2 --batch_size=8 \\
      --prefill_layout=wg_xyz/batch --decode_layout=ws_2d/batch --explain_layout

Several processes, each with devices of one mesh, are started alike but for their --process_id (process 0 writes):

  python -m t5x_inference_ext.infer ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

What is wrong with the files, the flags, the mesh or the checkpoint is said before the weights are loaded. On CPU,
XLA_FLAGS=--xla_force_host_platform_device_count=8 simulates eight devices.
"""

from collections.abc import Iterator

from absl import flags as absl_flags

from t5x_inference_ext import distributed
from t5x_inference_ext.commands import cli, sampling_flags
from t5x_inference_ext.config import NORM_SCALES
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.model.transformer import CACHE_DTYPES, COMPUTE_DTYPES
from t5x_inference_ext.runs import loading, prompts_file
from t5x_inference_ext.runs.job import Job
from t5x_inference_ext.sharding.layout import ATTENTION, FEEDFORWARD, RING_DIRECTIONS

INFER_REQUIRED = ('checkpoint', 'prompts', 'output')
# The defaults of what an Options holds are Options' own.
OPTIONS = (
  'mode',
  'mesh',
  'prefill_layout',
  'decode_layout',
  'dtype',
  'cache',
  'norm_scale',
  'batch_size',
  'max_new_tokens',
  'cache_length',
  'seed',
  'scan_layers',
  'executable',
  'batching',
  'prefill_chunk',
  'prefill_budget',
  'num_decodes',
  'token_log_probs',
  'top_log_probs',
)
PROCESS_FLAGS = ('coordinator_address', 'num_processes', 'process_id')
EXPLAINED_PROMPT = 512  # tokens, where --cache_length does not say how many there could be
PLAIN = (*INFER_REQUIRED, *OPTIONS, 'stop', 'vocabulary', 'overwrite', *sampling_flags.TEXTS)


def define_flags(flags: absl_flags.FlagValues) -> None:
  defaults = loading.InferOptions('')

  def define(kind, name, default, text, *arguments):
    getattr(absl_flags, f'DEFINE_{kind}')(name, default, *arguments, text, flag_values=flags)

  define(
    'string', 'checkpoint', None, 'The checkpoint directory: serving, or T5X (legacy or Orbax).'
  )
  define('string', 'prompts', None, 'The JSONL file to read.')
  define(
    'string',
    'output',
    None,
    'The JSONL file to write, whole or not at all. What was resolved goes into '
    f'OUTPUT{prompts_file.output.RECORD_SUFFIX}.',
  )
  define('boolean', 'overwrite', False, 'Replace an existing output.')
  define(
    'enum',
    'mode',
    defaults.mode,
    'predict; predict_with_aux, here the same (rows always have scores); or score.',
    loading.MODES,
  )
  define('integer', 'max_new_tokens', defaults.max_new_tokens, 'The limit for each row.')
  sampling_flags.define(define)
  define(
    'multi_string',
    'stop',
    [],
    'A text that ends a row, where the model writes it in the tokens that the vocabulary '
    'cuts it into; may be repeated.',
  )
  define(
    'integer',
    'num_decodes',
    defaults.num_decodes,
    'Samples of each prompt, which share its prefill: with more than '
    'one a row has them as `samples`.',
  )
  define('integer', 'seed', defaults.seed, 'Of the run; every row has its own seed from it.')
  define(
    'string',
    'mesh',
    None,
    'XxYxZ, such as 2x2x2, over the first devices. By default over all devices that '
    'divide the model.',
  )
  for phase in ('prefill', 'decode'):
    define(
      'string',
      f'{phase}_layout',
      getattr(defaults, f'{phase}_layout'),
      f'feedforward/attention of {phase}, and how '
      f'collectives run: {", ".join(FEEDFORWARD)} / {", ".join(ATTENTION)} [/ {", ".join(RING_DIRECTIONS)}]; '
      'see docs/layouts.md.',
    )
  define(
    'boolean',
    'explain_layout',
    False,
    'Print where every tensor would live, and stop; --prompts and --output '
    'are not needed. The mesh may be larger than the devices here. With gin flags too.',
  )
  define(
    'enum',
    'dtype',
    defaults.dtype,
    'Of activations and float weights; int8 weights stay int8.',
    COMPUTE_DTYPES,
  )
  define(
    'enum',
    'cache',
    defaults.cache,
    'What the KV cache holds; int8 has a scale for each position and head, and takes '
    'half of the memory of bfloat16. By default --dtype.',
    CACHE_DTYPES,
  )
  define(
    'integer', 'batch_size', defaults.batch_size, 'Rows a batch, rounded up to what the mesh takes.'
  )
  define(
    'boolean',
    'token_log_probs',
    False,
    'Also the log-probability of each token, as `log_probs`; of generated ones '
    'with continuous batching.',
  )
  define(
    'integer',
    'top_log_probs',
    defaults.top_log_probs,
    'With continuous batching: also the so many most likely tokens '
    'at each step and their log-probabilities, as `top_log_probs`.',
  )
  define(
    'enum',
    'batching',
    defaults.batching,
    'continuous: finished rows leave, waiting prompts enter; or static: '
    'batches that end with their last row. Rows are the same.',
    loading.BATCHING,
  )
  define(
    'integer',
    'prefill_chunk',
    defaults.prefill_chunk,
    'With continuous batching: positions of a prompt that one pass takes.',
  )
  define(
    'integer',
    'prefill_budget',
    defaults.prefill_budget,
    'With continuous batching: prompt tokens between decode steps while rows wait.',
  )
  define(
    'integer',
    'cache_length',
    None,
    "Positions of each row's cache, new tokens included; a prompt that does not "
    'fit is an error. By default as many as the longest prompt needs.',
  )
  define(
    'boolean',
    'scan_layers',
    None,
    'One loop over all layers, which compiles in seconds; --noscan_layers writes '
    'them out, which decodes faster on a TPU or GPU. By default a loop for more than 8 on CPU, else none.',
  )
  define(
    'string',
    'executable',
    None,
    'A generation that `python -m t5x_inference_ext.precompile --phase=generate --save` '
    'compiled for these chips, run instead of compiling; its batch and prompt size are used. It runs as code: use '
    'files of your own making alone.',
  )
  define(
    'string',
    'vocabulary',
    None,
    '`bytes` or a SentencePiece .model file. By default bytes for a model of 384 rows.',
  )
  define(
    'enum',
    'norm_scale',
    None,
    'How a T5X checkpoint stores its norm scales: around zero (PaLM) or one. By '
    'default what the checkpoint records, else zero.',
    NORM_SCALES,
  )
  define(
    'string',
    'coordinator_address',
    None,
    'HOST:PORT of process 0, of several processes that share the mesh; '
    'auto on TPU pods and other clusters that jax knows. With gin flags too.',
  )
  define(
    'integer',
    'num_processes',
    None,
    'Of the run, started with the same flags but for --process_id.',
  )
  define('integer', 'process_id', None, 'Of this process, from 0. Process 0 writes the output.')


def main(flags: absl_flags.FlagValues) -> None:
  """Serve every row of every job; the loop that all runs share."""
  for job in _jobs(flags):
    with job:
      while not job.work.finished:
        job.keep(job.work.step())
      job.write()


def _jobs(flags: absl_flags.FlagValues) -> Iterator[Job]:
  """Yield what there is to run: one job for a prompts file, one for each task of a mixture."""
  processes = {name: flags[name].value for name in PROCESS_FLAGS}
  distributed.check_arguments(**processes)
  if cli.uses_gin(flags):
    cli.check_unmixed(flags, PLAIN, 'CHECKPOINT_PATH=\\"DIR\\"', 'configs/runs/infer.gin')
    distributed.initialize(**processes)
    config_text = cli.parse_gin(flags)
    # seqio brings TensorFlow: seconds that plain runs spare.
    from t5x_inference_ext.runs import task_run

    infer = cli.configure(
      task_run.infer, config_text=config_text, explain_layout=flags.explain_layout
    )
    yield from infer()
    return
  required = ('checkpoint',) if flags.explain_layout else INFER_REQUIRED
  missing = [f'--{name}' for name in required if not flags[name].value]
  if missing:
    raise UserError(f'{", ".join(missing)} not given; --help shows examples')
  options = loading.InferOptions(
    checkpoint=flags.checkpoint,
    sampling=sampling_flags.sampling(flags),
    stop=tuple(flags.stop),
    **{name: flags[name].value for name in OPTIONS},
  )
  if flags.explain_layout:
    loading.explain_layout(
      options, EXPLAINED_PROMPT if options.max_prompt is None else options.max_prompt
    )
    return
  distributed.initialize(**processes)
  files = prompts_file.PromptsFiles(flags.prompts, flags.output, flags.vocabulary, flags.overwrite)
  yield from prompts_file.prepare(options, files)


def run(argv: list[str] | None = None) -> int:
  """The entry point; returns the exit code."""
  return cli.run(main, __doc__, define_flags, argv)
