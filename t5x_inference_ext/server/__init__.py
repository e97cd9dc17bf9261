"""HTTP over the engine: the API that OpenAI's clients speak, with bounds, metrics and a drain."""
