"""Falcon in Hugging Face transformers, with torch.compile and a static cache, for comparison.

Importing this module raises ImportError where PyTorch or transformers is absent.
"""

import numpy as np
import torch
import transformers
from transformers.generation.configuration_utils import CompileConfig

from t5x_inference_ext.config import ModelConfig


class Falcon:
  """A Falcon with random weights in bfloat16, on the GPU if there is one."""

  def __init__(self, config: ModelConfig, context: int):
    """Make a model.

    Args:
      config: ModelConfig. A shape for which accelerator.is_falcon is true.
      context: int. Positions of a row.
    """
    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    c = transformers.FalconConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.d_model,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      ffn_hidden_size=config.d_ff,
      layer_norm_epsilon=config.norm_epsilon,
      max_position_embeddings=context,
      multi_query=True,
      parallel_attn=True,
      new_decoder_architecture=False,
      bias=False,
      alibi=False,
      bos_token_id=0,
      eos_token_id=None,
      pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
      with torch.device(self.device):
        self.model = transformers.FalconForCausalLM(c).eval()
    finally:
      torch.set_default_dtype(before)

  @property
  def num_params(self) -> int:
    return sum(p.numel() for p in self.model.parameters())

  def generate(self, prompts: np.ndarray, new_tokens: int):
    """Return a function that continues prompts [B, T] greedily -> tokens [B, new_tokens].

    No row ends early. transformers compiles the decode step (CUDA graphs on a GPU), and keeps the
    compiled step for the next call with these sizes.
    """
    tokens = torch.tensor(prompts, dtype=torch.long, device=self.device)
    compile_config = CompileConfig(dynamic=False)  # each batch size gets code of its own
    compile_config._compile_all_devices = True  # on a CPU too, where this is tested
    options = dict(
      attention_mask=torch.ones_like(tokens),
      do_sample=False,
      min_new_tokens=new_tokens,
      max_new_tokens=new_tokens,
      cache_implementation='static',
      compile_config=compile_config,
    )

    @torch.inference_mode()
    def run() -> np.ndarray:
      # The copy to the host waits for the device.
      return self.model.generate(tokens, **options)[:, prompts.shape[1] :].cpu().numpy()

    return run

  def __str__(self) -> str:
    versions = f'transformers {transformers.__version__}, torch {torch.__version__}'
    return f'{versions}, {self.device}, static cache, compiled'
