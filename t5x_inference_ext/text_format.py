"""Byte counts and durations as text, for every report and progress line."""


def decimal_bytes(count: float) -> str:
  """Return bytes in SI units: 3_700_000 -> '3.7 MB'. GB is the largest unit."""
  return _in_units(count, 1000, ('kB', 'MB', 'GB'), 1)


def megabytes(count: float) -> str:
  """Return bytes in whole MB below 1 GB, else in GB: 151_200_000 -> '151 MB', or '8.15 GB'."""
  return f'{count / 1e6:.0f} MB' if count < 1e9 else f'{count / 1e9:.2f} GB'


def binary_bytes(count: float) -> str:
  """Return bytes in powers of 1024: 1536 -> '1.50 KiB'. GiB is the largest unit."""
  return _in_units(count, 1024, ('KiB', 'MiB', 'GiB'), 2)


def _in_units(count: float, step: int, units: tuple[str, ...], digits: int) -> str:
  if count < step:
    return f'{count:.0f} B'
  power = next((n for n in range(1, len(units)) if count < step ** (n + 1)), len(units))
  return f'{count / step**power:.{digits}f} {units[power - 1]}'


def gib(count: float) -> str:
  """Return bytes in GiB, without the unit: 34_359_738_368 -> '32.00'."""
  return f'{count / 2**30:.2f}'


def seconds_text(seconds: float) -> str:
  """Return a duration in us, ms or s: 0.0123 -> '12.30 ms', 4.213 -> '4.213 s'."""
  if seconds == 0:
    return '0'
  if seconds >= 1:
    return f'{seconds:.3f} s' if seconds < 100 else f'{seconds:.1f} s'
  return f'{seconds * 1e3:.2f} ms' if seconds >= 1e-4 else f'{seconds * 1e6:.1f} us'


def milliseconds(seconds: float) -> str:
  """Return a duration in ms, or in s from 10 s on: 0.0123 -> '12.30 ms'."""
  return f'{seconds * 1e3:.2f} ms' if seconds < 10 else f'{seconds:.1f} s'


def microseconds(seconds: float) -> str:
  """Return a duration in us: 0.0000123 -> '12.3 us'."""
  return f'{seconds * 1e6:.1f} us'


def rough_duration(seconds: float) -> str:
  """Return a rounded duration, at least 1 s: 7.8 -> '8 s'; longer ones '3 min' or '1.2 h'."""
  if seconds < 60:
    return f'{max(1, round(seconds))} s'
  return f'{seconds / 60:.0f} min' if seconds < 3600 else f'{seconds / 3600:.1f} h'


def parse_sizes(text: str) -> tuple[int, ...]:
  """Return the sizes in a text such as '2x4x8'; () if these are not whole numbers from 1 on."""
  parts = text.split('x')
  # At most 9 digits: Python refuses to convert numbers of thousands of digits.
  if all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
    return tuple(map(int, parts))
  return ()
