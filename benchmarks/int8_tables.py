"""A decode step compiled with int8 tables beside one with bfloat16 tables. No TPU.

  python -m benchmarks.int8_tables [--model=llama3_8b --slice=v4:2x2x1 --batch=8 --layers 8 16]

Tables are the embedding and an untied head. Prints the estimates of `python -m
t5x_inference_ext.precompile` with all layers, extrapolated from programs of two numbers of unrolled
layers. Few layers mislead: a head is prefetched while several layers run. Needs libtpu.
"""

import dataclasses

from benchmarks.few_layers import case_parser, times
from t5x_inference_ext.config import preset
from t5x_inference_ext.precompile.analysis import extrapolated


def main() -> None:
  parser = case_parser(__doc__, 'llama3_8b', 'v4:2x2x1')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--layers', type=int, nargs=2, default=(8, 16))
  arguments = parser.parse_args()
  config = preset(arguments.model)
  tables = 'embedding:8' if config.tied_head else 'embedding:8,head:8'
  for weights in arguments.weights, f'{arguments.weights},{tables}':
    case = weights, arguments.slice, 'decode', arguments.batch, 2048, arguments.layout
    found = [
      times(dataclasses.replace(config, num_layers=layers), *case) for layers in arguments.layers
    ]
    serial, overlapped = (
      1e3 * extrapolated(first, second, arguments.layers, config.num_layers)
      for first, second in (
        (found[0].serial, found[1].serial),
        (found[0].overlapped, found[1].overlapped),
      )
    )
    print(f'{weights}: {serial:.2f} ms serial, {overlapped:.2f} overlapped', flush=True)


if __name__ == '__main__':
  main()
