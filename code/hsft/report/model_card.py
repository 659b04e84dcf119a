"""The model card of an exported run, in the Hugging Face format, filled in from its results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from hsft.config import Config
from hsft.evaluator.metrics import PER_USER
from hsft.report.compare import Comparison, Row
from hsft.report.comparison_files import markdown
from hsft.report.result import split_sentence
from hsft.utils.errors import one_line

Format = Literal["merged", "adapter", "onnx"]

_LIBRARIES = {"merged": "transformers", "adapter": "peft", "onnx": "onnx"}
# Name of the row that was measured on an exported folder itself.
EXPORTED = "exported"
# Metadata of the cards: what the hub sorts models by.
TAGS = ("sequential-recommendation", "recommender-system", "hllm")


@dataclass(frozen=True)
class Exported:
    """What a card tells of.

    Attributes:
        name: the run's name.
        format: `merged`, a whole model; `adapter`, LoRA matrices for the base model; or `onnx`, the
            merged model as ONNX graphs.
        dtype: number type of the weights in the folder.
        config: the run's configuration.
        result: the run's `result.json`.
        table: its rows, measured as there; with `exported` when the folder itself was scored.
        tuned: name of the fine-tuned model's row.
        base: name of the base model's folder.
        base_repo: the hub's name of the checkpoint that it was imported from, where known.
        item_adapter: `none`, or the kind of the adapter that `hllm_extra.safetensors` or
            `trained.safetensors` holds.
        similarity: how its user and item vectors are compared, `cosine` or `dot`.
        other_ranks: users whose target ranks elsewhere than in the run; None: not scored.
        item_width: dimensions of the item embeddings where these are not the UserLLM's hidden size.
        residual_items: N of the residual whose weights this file holds too; 0: there is none.
        id_vectors: whether the folder has trained id vectors of items.
        item_llm: whether the folder has the ItemLLM that was trained along; None: none was.
    """

    name: str
    format: Format
    dtype: str
    config: Config
    result: Mapping[str, Any]
    table: Comparison
    tuned: str
    base: str
    base_repo: str | None
    item_adapter: str
    similarity: str
    other_ranks: int | None = None
    item_width: int | None = None
    residual_items: int = 0
    id_vectors: bool = False
    item_llm: bool | None = None

    @property
    def quantised(self) -> bool:
        """Whether training saw quantised weights."""
        return self.config.use_qlora and self.config.qlora_quant_type != "none"

    @property
    def own_row(self) -> Row | None:
        """The row that was measured on what the folder holds, None when nothing was."""
        name = self.tuned if self.format == "adapter" else EXPORTED
        return next((row for row in self.table.rows if row.name == name), None)


def model_card(exported: Exported) -> str:
    """Return a `README.md`: YAML header, results, settings, how to load the folder, limits."""
    return card(
        _metadata(exported),
        plain_text(exported.name),
        _summary(exported),
        {
            "Results": _results(exported),
            "Data": f"{_data(exported)}\n",
            "Loading": _loading(exported),
            "Limits": _limits(exported),
        },
    )


def card(metadata: ModelCardData, title: str, summary: str, sections: Mapping[str, str]) -> str:
    """Put a card together.

    Args:
        metadata: of the YAML header.
        title, summary: in Markdown, of one line and of a paragraph.
        sections: heading -> text, each ending with a newline; empty ones are left out.
    """
    parts = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n".join([f"---\n{metadata.to_yaml()}\n---\n", f"# {title}\n\n{summary}\n", *parts])


def _metadata(exported: Exported) -> ModelCardData:
    config, row = exported.config, exported.own_row
    measured = [
        record
        for records in exported.table.records
        for record in records
        if row and record.run == row.name
    ]
    eval_results = [
        EvalResult(
            task_type="sequential-recommendation",
            dataset_type=str(config.dataset),
            dataset_name=str(config.dataset),
            dataset_split=config.eval_phase,
            metric_type=record.metric,
            metric_value=round(record.value, 6),
        )
        for record in measured
    ]
    tags = [*TAGS, *(["lora"] if config.use_qlora else []), f"loss:{config.loss}"]
    return ModelCardData(
        library_name=_LIBRARIES[exported.format],
        base_model=exported.base_repo,
        tags=tags,
        datasets=[str(config.dataset)],
        metrics=[name for name in config.metrics if name in list(PER_USER)],
        # The hub asks for a name wherever there are results.
        model_name=exported.name if eval_results else None,
        eval_results=eval_results or None,
    )


def _summary(exported: Exported) -> str:
    config = exported.config
    base = _code(exported.base)
    if exported.base_repo:
        base += f" (imported from {plain_text(exported.base_repo)})"
    count = config.user_llm_layers
    layers = f", its first {'layer' if count == 1 else f'{count} layers'}," if count else ""
    trained = "LoRA" if config.use_qlora else "all weights"
    if exported.quantised:
        trained = f"LoRA on {config.qlora_quant_type} weights (QLoRA)"
    holds = {
        "merged": f"a whole decoder in {exported.dtype}"
        + (", the LoRA adapter merged into it" if config.use_qlora else ""),
        "onnx": "the decoder as an ONNX graph in float32"
        + (", the LoRA adapter merged into it" if config.use_qlora else ""),
        "adapter": "the LoRA adapter in peft's format, without the base model's weights",
    }
    return (
        f"A UserLLM of HLLM (arXiv 2409.12740): the decoder {base}{layers} fine-tuned on "
        f"{plain_text(config.dataset)} with {trained}. It reads the item embeddings of a user's history "
        f"and gives a user vector, which is compared with item vectors by {exported.similarity}. "
        f"The folder holds {holds[exported.format]}."
    )


def _results(exported: Exported) -> str:
    return f"{markdown(exported.table)}\n{_what_was_scored(exported)}\n"


def _what_was_scored(exported: Exported) -> str:
    if exported.format == "adapter":
        text = f"The row {exported.tuned} was measured with this adapter"
        if exported.quantised:
            text += f" on base weights quantised to {exported.config.qlora_quant_type}"
        return text + "."
    reasons = [f"the weights here are {exported.dtype}"]
    if exported.quantised:
        reasons.insert(
            0,
            f"LoRA was trained against {exported.config.qlora_quant_type} weights, and here it is "
            f"merged into these, which are no longer quantised but keep their rounding",
        )
    text = (
        f"The row {exported.tuned} was measured in the run, before the export: "
        f"{', and '.join(reasons)}. "
    )
    if exported.other_ranks is None:
        return text + "What this folder itself scores was not measured (`--evaluate True` does so)."
    users = len(exported.table.rows[0].users)
    how = "in ONNX Runtime" if exported.format == "onnx" else "by the same code"
    return (
        f"{text}The row exported was measured on this folder {how}: the target ranks "
        f"elsewhere for {exported.other_ranks} of {users} users."
    )


def _data(exported: Exported) -> str:
    data = exported.result.get("data")
    data = data if isinstance(data, dict) else {}
    sizes = [f"{data[key]} {key}" for key in ("users", "items", "interactions") if key in data]
    text = f"{plain_text(exported.config.dataset)}: {plain_text(', '.join(sizes))}."
    cache = exported.result.get("cache")
    if isinstance(cache, dict) and cache.get("model"):
        item_llm = str(cache["model"]).rstrip("/").rpartition("/")[2]
        text += f" Item embeddings: {_code(item_llm)}."
    return f"{text} Split: {split_sentence(exported.result)}."


def _loading(exported: Exported) -> str:
    codes = {"merged": _merged_code, "adapter": _adapter_code, "onnx": _onnx_code}
    text = f"```python\n{codes[exported.format](exported)}```\n"
    if exported.format == "onnx":
        return text
    if exported.format == "adapter":
        return text + (
            "\n`trained.safetensors` holds what was trained besides the adapter; `config.yaml` the "
            "run's settings, without its paths.\n"
        )
    held = ["the logit scale"]
    if exported.item_adapter != "none":
        held.append("the item adapter")
    if exported.residual_items:
        held.append("the residual's weights")
    return text + (
        "\nWith HSFT, which made it, `FOLDER` being this folder:\n\n"
        "```sh\npython code/main.py --config_file FOLDER/config.yaml --user_pretrain_dir FOLDER"
        f"{_item_cache(exported)}\n```\n\n"
        f"`hllm_extra.safetensors` holds {' and '.join(held)}; HSFT reads it beside the model. "
        f"Without this `config.yaml`, give `--similarity {exported.similarity}`.\n"
    )


def _item_cache(exported: Exported) -> str:
    """Name the run's item cache where the dataset's name does not lead to it."""
    config = exported.config
    if exported.item_llm is not None:
        return " \\\n    --item_cache_path FOLDER/item_cache.safetensors"
    if not config.item_cache_path:
        return ""
    path = Path(config.item_cache_path)
    shown = f"PATH/TO/{path.name}" if path.is_absolute() else str(path)
    return f" \\\n    --item_cache_path {shlex.quote(one_line(shown, 200).replace('`', ''))}"


def _merged_code(exported: Exported) -> str:
    lines = [
        "import torch",
        *_adapter_import(exported),
        "from transformers import AutoModel",
        "",
        'folder = "."  # this folder, or its name on the hub',
        "user_llm = AutoModel.from_pretrained(folder).eval()",
    ]
    return _text([*lines, *_use(exported, "hllm_extra.safetensors", "item_adapter.", "residual.")])


def _adapter_code(exported: Exported) -> str:
    config = exported.config
    options = []
    if config.user_llm_layers:
        options.append(f"num_hidden_layers={config.user_llm_layers}")
    if exported.quantised:
        options.append(f"quantization_config={_quantization_code(config)}")
    quantised = ", BitsAndBytesConfig" if exported.quantised else ""
    lines = [
        "import torch",
        "from peft import PeftModel",
        *_adapter_import(exported),
        f"from transformers import AutoModel{quantised}",
        "",
        f"base = {json.dumps(f'PATH/TO/{exported.base}')}  # your folder of the base model",
        'folder = "."  # this folder, or its name on the hub',
        f"decoder = AutoModel.from_pretrained({', '.join(['base', *options])})",
        "user_llm = PeftModel.from_pretrained(decoder, folder).eval()",
    ]
    prefixes = ("encoder.items.adapter.", "encoder.residual.")
    return _text([*lines, *_use(exported, "trained.safetensors", *prefixes)])


def _onnx_code(exported: Exported) -> str:
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "",
        'user_llm = onnxruntime.InferenceSession("user_llm.onnx")',
        'items = onnxruntime.InferenceSession("items.onnx")',
        "",
        "# The item embeddings of two histories, oldest first, padded on the right.",
        "width = user_llm.get_inputs()[0].shape[2]",
        "history = np.random.randn(2, 5, width).astype(np.float32)",
        'given = {"embeddings": history, "lengths": np.array([5, 3])}',
        "# The item embeddings of all candidates.",
        "catalogue = np.random.randn(100, width).astype(np.float32)",
        'candidates = {"embeddings": catalogue}',
    ]
    if exported.id_vectors:
        lines += [
            "# Their id vectors, of `item_id_vectors.safetensors`; zeros for items that are not there.",
            "dim = user_llm.get_inputs()[2].shape[2]",
            'given["id_vectors"] = np.zeros((2, 5, dim), np.float32)',
            'candidates["id_vectors"] = np.zeros((100, dim), np.float32)',
        ]
    return _text(
        [
            *lines,
            "(user_vectors,) = user_llm.run(None, given)",
            "(item_vectors,) = items.run(None, candidates)",
            "scores = user_vectors @ item_vectors.T",
        ]
    )


def _quantization_code(config: Config) -> str:
    if config.qlora_quant_type == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (
        f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={config.qlora_quant_type!r}, "
        f"bnb_4bit_use_double_quant={config.qlora_double_quant})"
    )


def _reads_trained(exported: Exported) -> bool:
    return exported.item_adapter != "none" or exported.residual_items > 0


def _adapter_import(exported: Exported) -> list[str]:
    return ["from safetensors.torch import load_file"] if _reads_trained(exported) else []


def _adapter_lines(exported: Exported, prefix: str) -> list[str]:
    """Return the lines that map `history` as `ItemTable` does, with its weights in `trained`."""

    def weight(name: str) -> str:
        return f'trained["{prefix}{name}"].float()'

    kind, square = exported.item_adapter, exported.item_width is None
    lines = []
    if kind == "linear":
        mapped = f"history.float() @ {weight('weight')}.T"
    elif kind == "lowrank":
        mapped = f"history.float() @ {weight('0.weight')}.T @ {weight('1.weight')}.T"
    else:
        lines = [
            f"hidden = history.float() @ {weight('hidden.weight')}.T + {weight('hidden.bias')}",
            "hidden = torch.nn.functional.gelu(hidden)",
        ]
        mapped = f"hidden @ {weight('out.weight')}.T + {weight('out.bias')}"
        if not square:
            mapped += f" + history.float() @ {weight('skip.weight')}.T"
    whole = (
        f"history + ({mapped}).to(history.dtype)" if square else f"({mapped}).to(user_llm.dtype)"
    )
    return [*lines, f"history = {whole}  # candidates' embeddings alike"]


def _residual_lines(exported: Exported, prefix: str) -> list[str]:
    """Return the lines that add the last items as `HistoryResidual` does, with `trained`'s weights."""
    lines = [
        "# The last items' unit vectors, newest first, are added to the output's.",
        "unit = torch.nn.functional.normalize",
        f'mapped = unit(user_vector.float(), dim=-1) @ trained["{prefix}weight"].T',
    ]
    if exported.residual_items == 1:
        return [*lines, "user_vector = mapped + unit(history[:, -1].float(), dim=-1)"]
    return [
        *lines,
        f"last = unit(history.float(), dim=-1).flip(1)[:, :{exported.residual_items}]",
        f'factors = torch.cat([torch.ones(1), trained["{prefix}lags"]])[: last.shape[1], None]',
        "user_vector = mapped + (factors * last).sum(1)",
    ]


def _use(exported: Exported, file: str, prefix: str, residual_prefix: str) -> list[str]:
    """Return the lines that turn a history's item embeddings into a user vector."""
    width = exported.item_width or "user_llm.config.hidden_size"
    shown = exported.item_width or "hidden size"
    lines = [
        "",
        f"# The item embeddings of one history, oldest first: [1, length, {shown}].",
        f"history = torch.randn(1, 5, {width}, dtype=user_llm.dtype)",
    ]
    if _reads_trained(exported):
        lines.append(f'trained = load_file(f"{{folder}}/{file}")')
    if exported.item_adapter != "none":
        lines += _adapter_lines(exported, prefix)
    if exported.id_vectors:
        lines += ["# Add the items' id vectors here, of `item_id_vectors.safetensors`."]
    lines += [
        "with torch.no_grad():",
        "    user_vector = user_llm(inputs_embeds=history).last_hidden_state[:, -1]",
    ]
    return lines + (_residual_lines(exported, residual_prefix) if exported.residual_items else [])


def _limits(exported: Exported) -> str:
    config = exported.config
    lines = [
        "It reads item embeddings, not text: those of the ItemLLM that it was trained with.",
        f"It was trained and measured on histories of at most {config.MAX_ITEM_LIST_LENGTH} items, "
        f"on one dataset, with one seed ({config.seed}).",
        "The table is offline ranking of held-out items; it says nothing of what users would do "
        "with the recommendations.",
        "The base model's and the data's licences apply; this card states none.",
    ]
    if config.item_embedding_transform != "none":
        lines.insert(
            1,
            f"The embeddings were mapped before (item_embedding_transform: "
            f"{config.item_embedding_transform}), with a map fitted on the catalogue, which is not "
            f"part of this folder.",
        )
    if exported.item_llm is not None:
        new = (
            "`item_llm/` encodes new ones"
            if exported.item_llm
            else "the ItemLLM that encodes new ones is not part of this folder"
        )
        lines.insert(
            1,
            f"The ItemLLM was trained along with it: `item_cache.safetensors` holds the vectors of "
            f"the items of {plain_text(config.dataset)}, and {new}.",
        )
    if exported.item_adapter != "none":
        lines.insert(
            1, f"The embeddings pass through a trained item adapter ({exported.item_adapter})."
        )
    if exported.residual_items:
        what = (
            "last item's vector is"
            if exported.residual_items == 1
            else f"last {exported.residual_items} items' vectors are"
        )
        lines.insert(
            1,
            f"The {what} added to the decoder's output, which passes through a trained matrix "
            f"(residual_items: {exported.residual_items}); the decoder alone is not the model.",
        )
    if exported.id_vectors:
        lines.insert(
            1,
            "Items of the training data have trained id vectors, which are added to their text "
            "vectors (`item_id_vectors.safetensors`, by item id); other items have none.",
        )
    return "".join(f"- {line}\n" for line in lines)


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def plain_text(text: object) -> str:
    """Write a name from a file as one line that Markdown takes for text."""
    return "".join(f"\\{char}" if char in "\\`*<>[]|" else char for char in one_line(text, 200))


def _code(text: object) -> str:
    return f"`{one_line(text, 200).replace('`', '')}`"
