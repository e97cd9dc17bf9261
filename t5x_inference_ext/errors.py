"""The errors that users see: one sentence naming what, where and the fix. Commands print them and exit with 2."""


class UserError(ValueError):
  """Something the user can mend: commands print the message alone, without a traceback."""


class CheckpointError(UserError):
  """A checkpoint that can't be read, or is not the one this model needs."""


class MeshError(UserError):
  """A mesh that does not fit the devices, the model or the batch."""


class RequestError(UserError):
  """A prompt, batch or option that can't be served."""
