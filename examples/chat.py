"""Ask a chat model a question and print its answer as it comes: `chat.py CHECKPOINT QUESTION`."""

import sys

from t5x_inference_ext import Engine


def main(checkpoint: str, question: str) -> None:
  engine = Engine.load(checkpoint, dtype='float32')
  template = engine.checkpoint.chat_template
  if template is None:
    sys.exit(f'{checkpoint} has no chat template: it is not a chat model')
  prompt = template.render([{'role': 'user', 'content': question}], add_generation_prompt=True)
  print(f'{question}\n\u2502', end='', flush=True)
  for event in engine.stream([prompt], max_new_tokens=64, slots=1):
    print(event.text, end='', flush=True)
  print()


if __name__ == '__main__':
  main(*sys.argv[1:])
