"""Runs of the infer command over a prompts file or a seqio task, from reading to writing."""
