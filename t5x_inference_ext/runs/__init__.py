"""What the infer command runs: a prompts file or a seqio task, from reading to writing."""
