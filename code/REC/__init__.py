"""HSFT: fine-tune only the UserLLM of HLLM (arXiv 2409.12740) on cached item embeddings."""

__version__ = "0.1.0"
