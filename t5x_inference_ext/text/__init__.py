"""Text: vocabularies, incremental decoding, stop texts, chat templates. No arrays, no devices."""
