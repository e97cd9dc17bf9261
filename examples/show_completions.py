"""Print what `python -m t5x_inference_ext.infer` wrote: `show_completions.py FILE.jsonl`.

A bar marks where a prompt ends and its completion begins.
"""

import json
import sys


def main(path: str):
  with open(path, encoding='utf-8') as rows:
    for row in map(json.loads, rows):
      print(f'--- {len(row["tokens"])} tokens, log-probability {row["score"]:.1f}')
      print(f'{row["prompt"]}\u2502{row["completion"].rstrip()}\n')


if __name__ == '__main__':
  main(sys.argv[1])
