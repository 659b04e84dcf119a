"""Datasets that yield integer ids, and the collate functions that make batches of them."""

from REC.data.dataset.collate_fn import EvalBatch, EvalCollate, TrainBatch, TrainCollate
from REC.data.dataset.testset import CachedEmbeddingEvalDataset
from REC.data.dataset.trainset import CachedEmbeddingTrainDataset

__all__ = [
    "CachedEmbeddingEvalDataset",
    "CachedEmbeddingTrainDataset",
    "EvalBatch",
    "EvalCollate",
    "TrainBatch",
    "TrainCollate",
]
