"""`CachedEmbeddingTrainDataset`, at the path it has in HLLM's training code."""

from hsft.data.dataset.trainset import CachedEmbeddingTrainDataset

__all__ = ["CachedEmbeddingTrainDataset"]
