"""Trial compilation of untrusted grammars, in a subprocess because they may hang or crash it.

The library that compiles grammars is native code, which can't be interrupted. Some grammars keep it
busy for minutes; others overflow its stack and crash the process.
"""

import contextlib
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
from typing import Any
import weakref

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.grammar_compiler import (
  GrammarRefused,
  TokenBytes,
  build_tokenizer,
  compile_grammar,
)

GRAMMAR_SECONDS = 2.0  # time limit for compiling a grammar
GRAMMAR_MEMORY = 2**30  # memory limit of the whole subprocess, in bytes
START_SECONDS = 60.0  # time limit for starting the subprocess, on a busy machine
CHECK_WAIT_SECONDS = 10.0  # time limit for waiting while other grammars are tried
# Stack of the subprocess. A thread's stack usually has 8 MiB, so a grammar that compiles with this
# one will not overflow a thread's.
_STACK = 2**20


class GrammarCheck:
  """Compiles grammars in a subprocess, to see whether they can be used. Thread-safe.

  The subprocess starts with the first grammar, and is restarted after a grammar that killed it. It
  ends when this object is closed or this process ends.

  Args:
    texts: Bytes of the model's tokens.
  """

  def __init__(self, texts: TokenBytes) -> None:
    self._texts = texts
    self._lock = threading.Lock()
    self._child: subprocess.Popen[bytes] | None = None
    self._stop: weakref.finalize[..., Any] | None = None

  def check(self, grammar: Grammar) -> None:
    """Raise GrammarRefused for a grammar that is invalid or needs too much time or memory.

    Raises:
      RequestError: Other grammars kept the subprocess busy for CHECK_WAIT_SECONDS.
    """
    if not self._lock.acquire(timeout=CHECK_WAIT_SECONDS):
      raise RequestError(
        f'grammar: others are being checked, for more than {CHECK_WAIT_SECONDS:g} s: try again'
      )
    try:
      if self._child is None:
        self._start()
      refused = self._answer((grammar.kind, grammar.source), GRAMMAR_SECONDS)
    except TimeoutError:
      self.close()
      refused = f'takes more than {GRAMMAR_SECONDS:g} s to compile'
    except (EOFError, OSError):
      self.close()
      refused = 'takes too much memory to compile, or is nested too deeply'
    finally:
      self._lock.release()
    if refused is not None:
      raise GrammarRefused(refused)

  def close(self) -> None:
    """End the subprocess."""
    if self._stop is not None:
      self._stop()
    self._child = None

  def _start(self) -> None:
    """Start the subprocess, and wait until it is ready."""
    self._child = subprocess.Popen(
      [sys.executable, '-c', f'from {__name__} import answer_checks; answer_checks()'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,  # hides messages of native code that crashes
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    self._stop = weakref.finalize(self, _end, self._child)
    try:
      self._answer(self._texts, START_SECONDS)
    except (TimeoutError, EOFError, OSError) as error:
      self.close()
      raise RequestError(
        f'grammar: the process that checks grammars did not start within {START_SECONDS:g} s: '
        'run `python -c "import llguidance"` to see why'
      ) from error

  def _answer(self, message: Any, seconds: float) -> Any:
    """Send a message to the subprocess, and return its answer.

    Raises:
      TimeoutError: No answer came within `seconds`.
      EOFError, OSError: The subprocess has ended.
    """
    assert self._child is not None and self._child.stdin and self._child.stdout
    pickle.dump(message, self._child.stdin)
    self._child.stdin.flush()
    with selectors.DefaultSelector() as selector:
      selector.register(self._child.stdout, selectors.EVENT_READ)
      if not selector.select(seconds):
        raise TimeoutError
    return pickle.load(self._child.stdout)


def _end(child: subprocess.Popen[bytes]) -> None:
  child.kill()
  child.wait()
  for pipe in (child.stdin, child.stdout):
    assert pipe is not None
    with contextlib.suppress(OSError):  # flushing unsent data fails if the subprocess has ended
      pipe.close()


def answer_checks() -> None:
  """Run the subprocess: for each grammar on stdin, write None or why it is refused."""
  import resource  # exists only on Unix, and only the subprocess needs it

  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  tokenizer = build_tokenizer(pickle.load(sys.stdin.buffer))
  resource.setrlimit(resource.RLIMIT_AS, (GRAMMAR_MEMORY, GRAMMAR_MEMORY))
  threading.stack_size(_STACK)
  answer = None
  while True:
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    try:
      kind, source = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    # A fatal signal, the only way to stop a native loop, ends this process even if its parent is
    # gone.
    signal.alarm(math.ceil(GRAMMAR_SECONDS) + 1)
    answers: list[str | None] = []
    thread = threading.Thread(target=_try, args=(Grammar(kind, source), tokenizer, answers))
    thread.start()
    thread.join()
    signal.alarm(0)
    answer = answers[0]


def _try(grammar: Grammar, tokenizer: Any, answers: list[str | None]) -> None:
  try:
    compile_grammar(grammar, tokenizer)
    answers.append(None)
  except GrammarRefused as refused:
    answers.append(str(refused))
  except BaseException as error:  # a panic of the library is a BaseException
    answers.append(f'is not one that can be used: {type(error).__name__}')
