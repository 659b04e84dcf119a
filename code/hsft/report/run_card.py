"""The card of a run that was exported as a whole: results, what the folder holds, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from hsft.config import Config
from hsft.report.compare import Comparison
from hsft.report.comparison_files import markdown
from hsft.report.model_card import TAGS, card, plain_text
from hsft.report.result import split_sentence


@dataclass(frozen=True)
class ExportedRun:
    """What a card tells of.

    Attributes:
        name: the run's name.
        config: its configuration.
        result: its `result.json`.
        table: the rows of it.
        with_data: whether interactions, item information and item cache are in the folder.
        trained: whether it has trained weights.
        user_llm: `folder`, `repo` and `fingerprint` of the UserLLM that it started from; None for a
            model without one.
    """

    name: str
    config: Config
    result: Mapping[str, Any]
    table: Comparison
    with_data: bool
    trained: bool
    user_llm: Mapping[str, Any] | None


def run_card(exported: ExportedRun) -> str:
    """Return a `README.md`: YAML header, results, content, how to use the run, limits."""
    config = exported.config
    return card(
        ModelCardData(tags=[*TAGS, f"model:{config.model}"], datasets=[str(config.dataset)]),
        plain_text(exported.name),
        f"A run of HSFT: the model {plain_text(config.model)} on {plain_text(config.dataset)}, with "
        f"all that HSFT's programs read of it.",
        {
            "Results": f"{markdown(exported.table)}\nSplit: {split_sentence(exported.result)}.\n",
            "Content": _content(exported),
            "Use": _use(exported),
            "Limits": _limits(exported),
        },
    )


def _content(exported: ExportedRun) -> str:
    lines = [
        "`result.json`, `ranks.safetensors`: the metrics, and the rank of every user's held-out item.",
        "`config.yaml`: the configuration, without paths of the machine that it ran on.",
    ]
    if exported.trained:
        lines.append("`best/`: the trained weights.")
    if exported.with_data:
        lines.append("`dataset/`, `information/`: interactions, item cache and item texts.")
    else:
        lines.append(
            "No data: interactions, item texts and item cache are not part of this folder."
        )
    if exported.user_llm is not None:
        lines.append(
            f"Not the weights of the UserLLM that it starts from: {_user_llm(exported.user_llm)}."
        )
    return "".join(f"- {line}\n" for line in lines)


def _user_llm(user_llm: Mapping[str, Any]) -> str:
    text = plain_text(user_llm["folder"])
    if user_llm["repo"]:
        text += f", imported from {plain_text(user_llm['repo'])}"
    if user_llm["fingerprint"]:
        text += f" (fingerprint {plain_text(user_llm['fingerprint'])})"
    return text


def _use(exported: ExportedRun) -> str:
    user_llm = " --user_pretrain_dir PATH/TO/USERLLM" if exported.user_llm is not None else ""
    data = "" if exported.with_data else " --data_path DIR --text_path DIR --item_cache_path FILE"
    text = (
        "`FOLDER` is this folder, or `hf://OWNER/NAME` of its repository on the hub:\n\n"
        f"```sh\nhsft recommend --run FOLDER --history ID,ID{user_llm}{data}\n"
        f"hsft report FOLDER{user_llm}{data}\n```\n"
    )
    if exported.user_llm is not None:
        text += (
            "\nThe UserLLM is your own copy of the one above; HSFT refuses another, by its "
            "fingerprint.\n"
        )
    return text


def _limits(exported: ExportedRun) -> str:
    lines = [
        "The table is offline ranking of held-out items; it says nothing of what users would do "
        "with the recommendations.",
        "The data's and the base models' licences apply; this card states none.",
    ]
    if exported.with_data:
        lines.append("The interactions are those of people: think of who may read them.")
    return "".join(f"- {line}\n" for line in lines)
