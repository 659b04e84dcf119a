"""Names of parameters as in HLLM, and what its keys that take prefixes of names do by them.

HLLM's `freeze_prefix`, `lr_mult_prefix` and `decay_check_name` choose parameters by their names in its
own modules, which are `user_llm.model.*`, `item_llm.model.*`, `item_emb_tokens` and `logit_scale`, and in
its models on item ids `item_embedding.*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from hsft.config import Config
from hsft.utils.errors import InputError

# Beginnings of names here -> in HLLM; what peft wraps a model in is no part of a name.
_BEGINNINGS = {
    "encoder.decoder.base_model.model.": "user_llm.model.",
    "encoder.decoder.": "user_llm.model.",
    "encoder.items.projection.": "item_id_proj_tower.",
    "encoder.items.weight": "item_embedding.weight",
    "encoder.positions": "position_embedding.weight",
    "item_llm.emb_token": "item_emb_tokens",
    "item_llm.model.base_model.model.": "item_llm.model.",
    "encoder.": "",
}
# Of the ItemLLM: frozen by itself where it is not trained.
_ITEM_LLM = ("item_llm", "item_emb_tokens")


def hllm_name(name: str) -> str:
    """Return the name in HLLM of a parameter of a `Recommender`; one that HLLM lacks keeps its own.

    The latter is without `encoder.`: `items.adapter.weight`, `residual.weight`, `layers.0.read.weight`.
    """
    for ours, theirs in _BEGINNINGS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def has_prefix(name: str, prefixes: Sequence[str]) -> bool:
    """Say whether the name in HLLM of a parameter of a `Recommender` begins with one of `prefixes`."""
    return hllm_name(name).startswith(tuple(prefixes))


def freeze_prefixed(model: nn.Module, config: Config, above: str = "") -> None:
    """Keep the parameters that `freeze_prefix` names as they are.

    Args:
        model: a `Recommender`, or a part of one.
        config: the configuration.
        above: what the names of the part begin with in a `Recommender`.

    Raises:
        InputError: a parameter begins with random numbers, which are not worth keeping.
    """
    if not config.freeze_prefix:
        return
    for name, weight in model.named_parameters():
        whole = f"{above}{name}"
        if not has_prefix(whole, config.freeze_prefix):
            continue
        if weight.requires_grad and not _was_trained(whole, config):
            raise InputError(
                f"freeze_prefix would keep {hllm_name(whole)}, which begins untrained in this run; name "
                f"only weights that were trained before."
            )
        weight.requires_grad_(False)


def _was_trained(name: str, config: Config) -> bool:
    if name == "logit_scale":
        return True
    if name.startswith("encoder.decoder."):
        return not config.has_random_user_llm
    return name.startswith("item_llm.") and not config.has_random_item_llm


def check_prefixes(model: nn.Module, config: Config) -> None:
    """Refuse prefixes that fit no parameter of a model.

    Args:
        model: a `Recommender`, with the ItemLLM where it is trained along.
        config: the configuration.

    Raises:
        InputError: says what the names begin with.
    """
    every = [hllm_name(name) for name, _ in model.named_parameters()]
    trained = [hllm_name(name) for name, weight in model.named_parameters() if weight.requires_grad]
    for prefix in config.freeze_prefix:
        if not config.trains_items_along and prefix.startswith(_ITEM_LLM):
            continue
        if not any(name.startswith(prefix) for name in every):
            raise InputError(
                f"freeze_prefix: no parameter begins with {prefix!r}; {_known(every)}."
            )
    for prefix in config.lr_mult_prefix:
        if not any(name.startswith(prefix) for name in trained):
            raise InputError(
                f"lr_mult_prefix: no parameter that is trained begins with {prefix!r}; {_known(trained)}."
            )
    part = config.decay_check_name
    if part is not None and not any(part in name for name in trained):
        raise InputError(
            f"decay_check_name: no parameter that is trained has {part!r} in its name; {_known(trained)}."
        )


def _known(names: Iterable[str]) -> str:
    """Say what names begin with: up to the number of a layer, or else to the first point."""
    beginnings: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        number = next((n for n, word in enumerate(words) if word.isdigit()), None)
        beginnings[".".join(words[:1] if number is None else words[: number + 1])] = None
    shown = list(beginnings)
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return f"names begin with {', '.join(shown[:12])}{more}"
