"""Byte counts and durations, as reports print them."""

import pytest

from t5x_inference_ext import text_format


@pytest.mark.parametrize(
  'function,value,text',
  [
    ('decimal_bytes', 0, '0 B'),
    ('decimal_bytes', 999, '999 B'),
    ('decimal_bytes', 3_700_000, '3.7 MB'),
    ('decimal_bytes', 2e12, '2000.0 GB'),
    ('megabytes', 151_200_000, '151 MB'),
    ('megabytes', 8.15e9, '8.15 GB'),
    ('binary_bytes', 1023, '1023 B'),
    ('binary_bytes', 1536, '1.50 KiB'),
    ('binary_bytes', 2**41, '2048.00 GiB'),
    ('gib', 2**35, '32.00'),
    ('seconds_text', 0, '0'),
    ('seconds_text', 4.2134, '4.213 s'),
    ('seconds_text', 123.45, '123.5 s'),
    ('seconds_text', 0.0123, '12.30 ms'),
    ('seconds_text', 12e-6, '12.0 us'),
    ('milliseconds', 9.5, '9500.00 ms'),
    ('milliseconds', 12.34, '12.3 s'),
    ('microseconds', 12.34e-6, '12.3 us'),
    ('rough_duration', 0.01, '1 s'),
    ('rough_duration', 150, '2 min'),
    ('rough_duration', 5400, '1.5 h'),
  ],
)
def test_text(function, value, text):
  assert getattr(text_format, function)(value) == text
