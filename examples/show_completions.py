"""Prints the rows that `python -m t5x_inference_ext.infer` wrote: `python examples/show_completions.py FILE.jsonl`."""

import json
import sys


def main(path: str):
  with open(path, encoding='utf-8') as rows:
    for row in map(json.loads, rows):
      print(f'--- prompt\n{row["prompt"]}')
      print(
        f'--- completion ({len(row["tokens"])} tokens, score {row["score"]:.3f})\n{row["completion"]}\n'
      )


if __name__ == '__main__':
  main(sys.argv[1])
