"""The parameters of one row of slots, as arrays of the shapes that all rows of slots use."""

from collections.abc import Sequence

import numpy as np

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, slot_params
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.errors import RequestError


def slot_row(
  sampling: SamplingParams,
  vocab_size: int,
  *,
  seed: int,
  limit: int,
  end_ids: int | Sequence[int] = -1,
  top: int = 0,
  top_width: int = 0,
) -> RowParams:
  """Return the parameters of one row of slots, as numpy arrays [1, ...].

  Shapes and features do not depend on the row, so one program serves every request.

  Args:
    sampling: Sampling parameters. Stop sequences are left out: the host looks for them.
    vocab_size: V.
    seed: Seed of the row's sampling noise.
    limit: Maximum number of new tokens.
    end_ids: Ids that end the row. Negative ids are ignored.
    top: Number of most likely tokens to return with each token, at most `top_width`.
    top_width: Width that all rows have; see RowParams.

  Raises:
    RequestError: More end ids, biased tokens or most likely tokens than a row has room for, or ids
      outside the vocabulary.
  """
  if not 0 <= top <= top_width:
    raise RequestError(
      f'at most {top_width} of the most likely tokens can be returned with each token, got {top}'
    )
  return RowParams(
    slot_params(sampling, vocab_size),
    np.asarray([seed], np.uint32),
    np.asarray([limit], np.int32),
    end_id_array(end_ids, 1),
    np.asarray([top], np.int32),
    top_width,
  )
