"""The collate functions, at the path they have in HLLM's training code."""

from hsft.data.dataset.collate_fn import EvalBatch, EvalCollate, TrainBatch, TrainCollate

__all__ = ["EvalBatch", "EvalCollate", "TrainBatch", "TrainCollate"]
