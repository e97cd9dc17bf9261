"""HTTP server over the engine: OpenAI's API, limits on waiting work, metrics, graceful shutdown."""
