"""Datasets that yield integer ids, and the collate functions that make batches of them."""

from hsft.data.dataset.collate_fn import EvalBatch, EvalCollate, TrainBatch, TrainCollate
from hsft.data.dataset.testset import CachedEmbeddingEvalDataset
from hsft.data.dataset.trainset import CachedEmbeddingTrainDataset

__all__ = [
    "CachedEmbeddingEvalDataset",
    "CachedEmbeddingTrainDataset",
    "EvalBatch",
    "EvalCollate",
    "TrainBatch",
    "TrainCollate",
]
