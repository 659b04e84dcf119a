"""The ItemLLM, and the building of item caches with it."""
