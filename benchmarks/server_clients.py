"""Clients that stream completions together: the seconds that they wait for all tokens.

    python -m benchmarks.server_clients URL CLIENTS NEW_TOKENS CONSTRAINED

benchmarks/server.py starts this program, which imports nothing of the package, to cost little.
"""

import asyncio
import json
import sys
import time

LINE = {'type': 'regex', 'regex': '[ -~]*'}  # never ends by itself
PROMPT = 'The quick brown fox jumps over the lazy dog. '


async def post(
  host: str, port: int, body: dict
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
  """Request a completion; return the connection, which the server closes after its answer."""
  reader, writer = await asyncio.open_connection(host, port)
  data = json.dumps(body).encode()
  writer.write(
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    b'connection: close\r\ncontent-length: %d\r\n\r\n' % len(data)
  )
  writer.write(data)
  return reader, writer


async def stream_one(host: str, port: int, body: dict) -> float:
  """Request a stream; return the time of its last token."""
  reader, writer = await post(host, port, body)
  answer = await reader.read()
  writer.close()
  assert answer.startswith(b'HTTP/1.1 200 ') and b'data: [DONE]' in answer, answer[:300]
  return time.perf_counter()


def run_clients(url: str, count: int, new_tokens: int, constrained: int) -> None:
  """Print the seconds that clients together waited for all of their tokens.

  Args:
    url: Address of the server.
    count: Number of clients.
    new_tokens: Tokens of each answer.
    constrained: Number of clients that request a text with a regular expression as grammar.
  """
  host, _, port = url.removeprefix('http://').partition(':')

  async def all_clients():
    bodies = [
      {
        'prompt': f'{i} {PROMPT}',
        'max_tokens': new_tokens,
        'stream': True,
        'ignore_eos': True,
        'temperature': 0,
        'response_format': LINE if i < constrained else {'type': 'text'},
      }
      for i in range(count)
    ]
    begin = time.perf_counter()
    ends = await asyncio.gather(*(stream_one(host, int(port), body) for body in bodies))
    return max(ends) - begin

  print(asyncio.run(all_clients()))


if __name__ == '__main__':
  run_clients(sys.argv[1], *map(int, sys.argv[2:]))
