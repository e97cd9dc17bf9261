"""Compiling all programs of an engine without running any."""

import pytest

from benchmarks.ready_compile import compiled_programs
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from tests import memory, reference
from tests.text.vocabularies import Characters


def names(found):
  return [(program.name, program.sizes) for program in found]


@pytest.mark.usefixtures('quick_programs')
def test_the_programs_are_those_that_warm_up_compiles():
  engine = memory.engine(memory.ODD, reference.random_tensors(memory.ODD), '1x1x1', stacked=True)
  sizes = dict(page_size=32, page_reads=1, prefill_chunk=16, prefix_bytes=2**14, end_ids=())
  config = SchedulerConfig(2, 64, **sizes)
  core = Scheduler(engine.model, engine.weights, config, vocabulary=Characters())
  wanted = names(core.warm_up())
  ran = programs.insert.compiled
  begun, found = compiled_programs(engine.model, engine.weights, config)
  assert names(found) == wanted and begun > 0
  assert all(program.seconds > 0 for program in found) and programs.insert.compiled == ran
  only = 'start_with_blocks', 'prefill_chunk'
  _, some = compiled_programs(engine.model, engine.weights, config, only, most=1)
  assert names(some) == [wanted[0], ('start_with_blocks', {})]
