"""Text: vocabularies, decoding, stop texts, chat templates, grammars. No arrays, no devices."""
