"""Clients that stream completions together: the seconds that they wait for all tokens.

    python -m benchmarks.server_clients URL CLIENTS NEW_TOKENS

benchmarks/server.py starts it; it imports nothing of the package, so that it costs little itself.
"""

import asyncio
import json
import sys
import time

PROMPT = 'The quick brown fox jumps over the lazy dog. '


async def stream_one(host: str, port: int, body: dict) -> float:
  """Ask for a stream; return the time of its last token."""
  reader, writer = await asyncio.open_connection(host, port)
  data = json.dumps(body).encode()
  writer.write(
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    b'connection: close\r\ncontent-length: %d\r\n\r\n' % len(data)
  )
  writer.write(data)
  answer = await reader.read()
  writer.close()
  assert answer.startswith(b'HTTP/1.1 200 ') and b'data: [DONE]' in answer, answer[:300]
  return time.perf_counter()


def run_clients(url: str, count: int, new_tokens: int) -> None:
  """Print the seconds that clients together waited for all of their tokens."""
  host, _, port = url.removeprefix('http://').partition(':')

  async def all_clients():
    bodies = [
      {
        'prompt': f'{i} {PROMPT}',
        'max_tokens': new_tokens,
        'stream': True,
        'ignore_eos': True,
        'temperature': 0,
      }
      for i in range(count)
    ]
    begin = time.perf_counter()
    ends = await asyncio.gather(*(stream_one(host, int(port), body) for body in bodies))
    return max(ends) - begin

  print(asyncio.run(all_clients()))


if __name__ == '__main__':
  run_clients(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
