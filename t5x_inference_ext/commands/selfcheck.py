"""Check this package on the local devices: the command for the first minutes on a TPU.

  python -m t5x_inference_ext.selfcheck --output=report.json

It prints the devices and how they are connected. It decodes golden tokens with the bundled
checkpoint: with float32 weights in every pair of layouts, with int8 weights in every layout, and
through the scheduler that serves requests. It times a few programs; on a TPU it compares the times
with estimates. If a part fails, the failure is printed and the other parts still run. The report
contains all results, to send to the developers.

On a slice of several hosts, start it on all of them:

  python -m t5x_inference_ext.selfcheck --coordinator_address=auto --output=report.json

Without accelerators it takes a minute or two; XLA_FLAGS=--xla_force_host_platform_device_count=8
simulates eight devices. The exit code is 0 if nothing is wrong, 1 if a golden token differs or a
part failed, 2 for an error in the flags.
"""

from absl import flags as absl_flags

from t5x_inference_ext import distributed
from t5x_inference_ext.commands import cli, option_flags
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.runs.selfcheck.selfcheck import SelfcheckOptions, selfcheck

RIGHT, WRONG = 0, 1


def define_flags(flags: absl_flags.FlagValues) -> None:
  """Define the command's flags, in the order of --help."""
  option_flags.define_options(flags, SelfcheckOptions)
  option_flags.define_options(flags, ProcessOptions)


def run(argv: list[str] | None = None) -> int:
  """Run the command; return its exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    flags = session.parse()
    if cli.uses_gin(flags):
      raise UserError('selfcheck takes no gin flags: it checks one model, in all layouts')
    options = option_flags.read_options(flags, SelfcheckOptions)
    distributed.initialize(option_flags.read_options(flags, ProcessOptions))
    session.code = RIGHT if selfcheck(options) else WRONG
  return session.code
