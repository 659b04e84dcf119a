"""`CachedEmbeddingEvalDataset`, at the path it has in HLLM's training code."""

from hsft.data.dataset.testset import CachedEmbeddingEvalDataset

__all__ = ["CachedEmbeddingEvalDataset"]
