"""The model on a mesh: weights, layers, KV cache, and the passes over them.

To read the model in one sitting: transformer.py and cached_passes.py (the passes), forward.py (what
every pass runs on every shard), then block.py (one layer). Array annotations use the letters of
config.py: capitals ('B T E') for global arrays, lower case ('b t e') for one shard's part of them.
"""
