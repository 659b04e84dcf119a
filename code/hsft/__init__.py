"""HSFT: fine-tune only the UserLLM of HLLM (arXiv 2409.12740) on cached item embeddings.

Five lines do what the programs do::

    import hsft

    config = hsft.load_config("overall/LLM_ddp.yaml", "HLLM/HLLM.yaml", dataset="Pixel200K", ...)
    hsft.cache_items(config)
    run = hsft.train(config)
    print(run.metrics)

The names of `__all__` are imported when they are first used (PEP 562), so that `import hsft` does not
wait for torch, configures nothing and writes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from hsft.api import (
        Run,
        cache_items,
        compare,
        evaluate,
        load_config,
        open_run,
        train,
    )
    from hsft.config.schema import Config
    from hsft.data.cache import ItemCache, open_cache, save_cache
    from hsft.data.dataset.testset import CachedEmbeddingEvalDataset
    from hsft.data.dataset.trainset import CachedEmbeddingTrainDataset
    from hsft.data.interactions import Interactions, read_interactions
    from hsft.data.split import Split, TimeCuts, global_time, leave_one_out, time_cuts
    from hsft.evaluator.evaluator import Evaluation, Evaluator
    from hsft.model import losses
    from hsft.model.item_table import ItemTable
    from hsft.model.recommender import LossSettings, Recommender, SequenceEncoder
    from hsft.model.user_llm import UserLLM
    from hsft.utils.errors import InputError, InputErrors, Interrupted

# Public name -> the module that has it.
_MODULES = {
    **dict.fromkeys(
        ("Run", "cache_items", "compare", "evaluate", "load_config", "open_run", "train"),
        "hsft.api",
    ),
    "Config": "hsft.config.schema",
    **dict.fromkeys(("ItemCache", "open_cache", "save_cache"), "hsft.data.cache"),
    "CachedEmbeddingEvalDataset": "hsft.data.dataset.testset",
    "CachedEmbeddingTrainDataset": "hsft.data.dataset.trainset",
    **dict.fromkeys(("Interactions", "read_interactions"), "hsft.data.interactions"),
    **dict.fromkeys(
        ("Split", "TimeCuts", "global_time", "leave_one_out", "time_cuts"), "hsft.data.split"
    ),
    **dict.fromkeys(("Evaluation", "Evaluator"), "hsft.evaluator.evaluator"),
    "losses": "hsft.model",
    "ItemTable": "hsft.model.item_table",
    **dict.fromkeys(("LossSettings", "Recommender", "SequenceEncoder"), "hsft.model.recommender"),
    "UserLLM": "hsft.model.user_llm",
    **dict.fromkeys(("InputError", "InputErrors", "Interrupted"), "hsft.utils.errors"),
}

__all__ = [
    "CachedEmbeddingEvalDataset",
    "CachedEmbeddingTrainDataset",
    "Config",
    "Evaluation",
    "Evaluator",
    "InputError",
    "InputErrors",
    "Interactions",
    "Interrupted",
    "ItemCache",
    "ItemTable",
    "LossSettings",
    "Recommender",
    "Run",
    "SequenceEncoder",
    "Split",
    "TimeCuts",
    "UserLLM",
    "__version__",
    "cache_items",
    "compare",
    "evaluate",
    "global_time",
    "leave_one_out",
    "load_config",
    "losses",
    "open_cache",
    "open_run",
    "read_interactions",
    "save_cache",
    "time_cuts",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hsft' has no attribute '{name}'")
    module = import_module(_MODULES[name])
    if name == "losses":
        return import_module("hsft.model.losses")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
