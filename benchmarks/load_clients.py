"""Clients that keep a server busy: requests of mixed lengths, some of them dropped; and a burst.

    python -m benchmarks.load_clients URL mixed CLIENTS SECONDS
    python -m benchmarks.load_clients URL burst CLIENTS TOKENS

benchmarks/server_load.py starts this program, and reads its JSON lines. Like server_clients, the
program imports nothing of the package. `mixed` prints a line for each request, `burst` one line.
"""

import asyncio
import json
import random
import re
import sys
import time

from benchmarks.server_clients import post

LONGEST, MOST_NEW = 160, 60  # maximum tokens of a prompt, and of an answer
LEAVING = 0.1  # share of clients that leave
BURST_SECONDS = 0.5  # time after which all clients of a burst leave


def random_body(rng: random.Random) -> dict:
  """Return a request of random length."""
  return {
    'prompt': [rng.randrange(3, 259) for _ in range(round(LONGEST ** rng.random()))],
    'max_tokens': rng.randint(1, MOST_NEW),
    'temperature': rng.choice((0, 0.8)),
    'seed': rng.randrange(2**32),
    'stream': rng.random() < 0.5,
    'return_token_ids': True,
  }


def parsed(answer: bytes) -> dict:
  """Return the status, tokens and finish reason of an answer, whole or streamed."""
  head, _, rest = answer.partition(b'\r\n\r\n')
  status = int(head.split()[1])
  if b'text/event-stream' in head:
    *events, last = re.findall(rb'^data: (.*)$', rest, re.MULTILINE)
    choices = [json.loads(event)['choices'][0] for event in events]
    assert last.strip() == b'[DONE]', answer[-300:]
  else:
    choices = json.loads(rest).get('choices', [])
  return {
    'status': status,
    'tokens': [token for choice in choices for token in choice['token_ids']],
    'finish': choices[-1]['finish_reason'] if choices else None,
  }


async def ask(host: str, port: int, body: dict, leaves_after: float | None) -> dict:
  """Send a request; read the whole answer, or leave before."""
  reader, writer = await post(host, port, body)
  try:
    answer = await asyncio.wait_for(reader.read(), leaves_after)
  except TimeoutError:
    writer.transport.abort()  # discards data that was not sent yet
    return {'left': True}
  writer.close()
  return {'left': False, **parsed(answer)}


async def mixed(host: str, port: int, count: int, seconds: float) -> None:
  """Let clients ask one request after the other until the time is up."""
  end = time.monotonic() + seconds

  async def client(number: int) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
      body = random_body(rng)
      leaves_after = rng.random() * 0.3 if rng.random() < LEAVING else None
      if leaves_after is not None:  # a shorter answer would end before the client leaves
        body.update(max_tokens=MOST_NEW, ignore_eos=True)
      print(json.dumps({'body': body, **await ask(host, port, body, leaves_after)}))

  await asyncio.gather(*map(client, range(count)))


async def burst(host: str, port: int, count: int, tokens: int) -> None:
  """Send long prompts together and leave, then ask something short."""
  rng = random.Random(0)
  bodies = [
    {'prompt': [rng.randrange(3, 259) for _ in range(tokens)], 'max_tokens': 50, 'ignore_eos': True}
    for _ in range(count)
  ]
  found = await asyncio.gather(*(ask(host, port, body, BURST_SECONDS) for body in bodies))
  begin = time.monotonic()
  fresh = await ask(host, port, {'prompt': 'y', 'max_tokens': 4, 'return_token_ids': True}, None)
  seconds = time.monotonic() - begin
  left = sum(each['left'] for each in found)
  print(json.dumps({'left': left, 'status': fresh['status'], 'seconds': seconds}))


if __name__ == '__main__':
  host, _, port = sys.argv[1].removeprefix('http://').partition(':')
  case, count, amount = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
  asyncio.run({'mixed': mixed, 'burst': burst}[case](host, int(port), count, amount))
