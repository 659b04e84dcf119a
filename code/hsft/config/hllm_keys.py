"""Keys of HLLM's YAML files and command lines that are no keys here: what becomes of each.

They are those that occur in the YAML files, the scripts and the code of HLLM (arXiv 2409.12740's public
code, commit 2deed17). A key is accepted with the values that ask for what happens here anyway, so that
HLLM's files can be used as they are, and refused with any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HllmKey:
    """A key of HLLM.

    Attributes:
        instead: what to use instead of a value that is refused.
        accepted: the values that are not, texts in lower case; None: no value is refused.
        why: why an accepted value changes nothing.
    """

    instead: str = ""
    accepted: tuple[Any, ...] | None = ()
    why: str = ""

    def accepts(self, value: Any) -> bool:
        """Say whether a value asks for what happens here anyway, as null, HLLM's "not set", does."""
        if value is None or self.accepted is None:
            return True
        value = value.lower() if isinstance(value, str) else value
        # 1 is no True here.
        return any(value == one and type(value) is type(one) for one in self.accepted)


_CHECKPOINT = (
    "import the checkpoint with download_itemllm.py and download_userllm.py, and name the folders "
    "with item_pretrain_dir and user_pretrain_dir"
)

HLLM_KEYS: Mapping[str, HllmKey] = {
    # General.
    "state": HllmKey("the log has the level INFO alone", ("info",), "it is the level of the log"),
    "reproducibility": HllmKey(accepted=None, why="every run draws from seed"),
    "use_gpu": HllmKey("use device: cpu", (True,), "device chooses"),
    "log_path": HllmKey("each run has its run.log in the run's folder; name that with run_name"),
    "update_interval": HllmKey(accepted=None, why="progress is shown by time, not by batches"),
    "repeatable": HllmKey(accepted=None, why="HLLM's code does not read it either"),
    "eval_type": HllmKey(accepted=None, why="metrics decide it, in HLLM too"),
    "valid_metric_bigger": HllmKey(
        "valid_metric takes metrics of which more is better", (True,), "it is so for every metric"
    ),
    "tail_ratio": HllmKey(
        "the tail of TailPercentage, a metric of list_metrics, is the items that hold the last 20 % of the "
        "interactions"
    ),
    "loss_decimal_place": HllmKey(accepted=None, why="result.json has the losses unrounded"),
    "debug": HllmKey(
        "try a run with a small data set, or with --check True", (False,), "it is off"
    ),
    "need_training": HllmKey("use val_only: True", (True,), "val_only says so"),
    # Data.
    "test_dataset": HllmKey(accepted=None, why="HLLM's code does not read it either"),
    "train_path": HllmKey(
        "data_path and dataset name the interactions, from which training is split"
    ),
    "use_text": HllmKey(accepted=None, why="model decides it"),
    "use_modality": HllmKey("items are known by their text or their ids", (False,), "it is off"),
    "use_time": HllmKey("use use_timestamps", (False,), "use_timestamps is off"),
    # Weights.
    "item_emb_pretrain": HllmKey(
        f"the emb token is in the ItemLLM's folder or in load_pretrain; {_CHECKPOINT}"
    ),
    # Training.
    "freeze_ad": HllmKey("use train_item_llm: none", (False,), "train_item_llm decides it"),
    "ft_item": HllmKey("use train_item_llm", (True,), "item vectors that a model has are trained"),
    "optimizer_kwargs": HllmKey("set optimizer and optim_args"),
    "learning_rate": HllmKey("use optim_args.learning_rate"),
    "weight_decay": HllmKey("use optim_args.weight_decay"),
}

# Shapes of the models on item ids, which have a section each here: key -> names within a section.
SHAPES: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("layers",),
    "n_heads": ("heads",),
    "embedding_size": ("hidden_size",),
    "hstu_embedding_size": ("hidden_size",),
    "item_embedding_size": ("item_width",),
    "item_embed_dim": ("item_width",),
    "hidden_dropout_prob": ("dropout",),
    "attn_dropout_prob": ("attention_dropout", "dropout"),
    "enable_relative_attention_bias": ("position_bias",),
    "inner_size": (),
    "hidden_act": (),
    "layer_norm_eps": (),
    "initializer_range": (),
}
# HLLM's names of models on item ids -> the names here.
HLLM_MODELS: Mapping[str, str] = {"SASRec": "sasrec", "HSTU": "hstu", "LLMIDRec": "llm_id"}
