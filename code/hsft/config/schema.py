"""Every configuration key with its type, range, unit and default.

`--help` and docs/keys.md are made from it.

Keys that HLLM's YAML files know keep their names and meaning (arXiv 2409.12740's public code).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    model_validator,
)

# Means over users of a value at K, which validation can be by.
PerUserMetric = Literal["Recall", "NDCG", "MRR", "HitRate", "MAP", "Precision"]
MetricName = Literal[PerUserMetric, "AUC", "GAUC", "Coverage"]
PER_USER_METRICS = get_args(PerUserMetric)
METRIC_PATTERN = re.compile(rf"^({'|'.join(PER_USER_METRICS)})@([1-9][0-9]*)$")
# What names of parameters begin with, as in HLLM where it has them (`model/parameter_names.py`).
FIRST_NAMES = {
    "HLLM": (
        *("user_llm", "item_llm", "item_emb_tokens", "logit_scale", "items", "residual", "times"),
    ),
    "llm_id": ("user_llm", "item_embedding", "item_id_proj_tower", "logit_scale", "times"),
    "sasrec": ("item_embedding", "position_embedding", "layers", "logit_scale"),
    "hstu": (
        *("item_embedding", "item_id_proj_tower", "position_embedding", "layers", "logit_scale"),
    ),
}
# What a time of `split: global_time` may be beside a date.
SHARE_PATTERN = re.compile(r"0?\.[0-9]{1,18}")
TIMESTAMP_PATTERN = re.compile(r"-?[0-9]{1,18}")
# Models that know items by their embeddings, so that an item they never met can be scored.
READS_EMBEDDINGS = ("HLLM", "item_knn")
# Models that are trained on item ids alone.
ID_MODELS = ("sasrec", "hstu", "llm_id")
# Models that main.py trains.
TRAINED_MODELS = ("HLLM", *ID_MODELS)
# Models that can be told when items were interacted with.
TIME_MODELS = ("HLLM", "hstu", "llm_id")
# Those of them that read seconds, not the fields of a date.
RAW_TIME_MODELS = ("hstu",)
# Models whose histories an LLM reads.
USER_LLM_MODELS = ("HLLM", "llm_id")
# What the names of the keys of the ItemLLM's training begin with.
ITEM_TRAINING_KEYS = (
    *("train_item_", "item_lora_", "item_quant_", "item_lr_", "item_freeze_", "item_gradient_"),
    *("item_chunk_", "item_llm_init", "item_pretrain_epochs", "item_pretrain_batch_size"),
)
# What `negatives: auto` draws for HLLM in a forward pass.
AUTO_NUM_NEGATIVES = 512
# Models without training.
REFERENCES = ("pop", "random", "item_knn", "tfidf")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return float(value)


def _text(value: Any) -> Any:
    # Text keys such as `dataset: 2024` arrive from YAML as numbers.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a NUL character")
        if not _is_unicode(value):
            raise ValueError("is not UTF-8 text")
    return value


def _is_unicode(value: str) -> bool:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _plain_name(value: str | None) -> str | None:
    if value is not None and (value in ("", ".", "..") or "/" in value or "\\" in value):
        raise ValueError("must be a plain name without folders; data_path names the folder")
    return value


def _split_time(value: str | None) -> str | None:
    if value is None or TIMESTAMP_PATTERN.fullmatch(value):
        return value
    if SHARE_PATTERN.fullmatch(value) and float(value) > 0:
        return value
    try:
        datetime.fromisoformat(value.removesuffix(" UTC"))
    except ValueError as error:
        raise ValueError(
            "must be a share between 0 and 1, a date such as 2024-05-31, or a whole number as the "
            "data's timestamps"
        ) from error
    return value


def _data_split(value: Any) -> Any:
    # Files and command lines may name a split here, which the loader takes for `split`.
    if isinstance(value, str):
        raise ValueError(
            "must be True or False: whether to cut long training histories into pieces, as in HLLM; "
            "how users are held out is split: leave_one_out or global_time"
        )
    return value


def _prefixes(value: Any) -> Any:
    # HLLM's null, and one prefix on a command line.
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _batch_size(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= 1_000_000):
        return value
    raise ValueError("must be auto or a whole number from 1 to 1000000")


def _not_repeated(value: list[Any]) -> list[Any]:
    if len(set(value)) != len(value):
        raise ValueError("has a repeated entry")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(_text), Field(max_length=10_000)]
Bool = StrictBool
Int = StrictInt
SplitTime = Annotated[Text, AfterValidator(_split_time)]
PositiveInt = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Runs = Annotated[list[Text], Field(min_length=2, max_length=3), AfterValidator(_not_repeated)]
NamePrefixes = Annotated[
    list[Annotated[Text, Field(min_length=1)]],
    BeforeValidator(_prefixes),
    AfterValidator(_not_repeated),
]
UniqueTexts = Annotated[list[Text], Field(min_length=1), AfterValidator(_not_repeated)]
if TYPE_CHECKING:
    # A run replaces `auto` before anything reads the key (`run/batch_size.py`).
    BatchSize = int
    # `Config` replaces `auto` when it is made.
    Negatives = Literal["in_batch", "sampled", "per_sequence", "catalogue"]
else:
    BatchSize = Annotated[int | Literal["auto"], PlainValidator(_batch_size)]
    Negatives = Literal["auto", "in_batch", "sampled", "per_sequence", "catalogue"]

DType = Literal["float16", "bfloat16", "float32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=False, frozen=True)


class OptimArgs(_Section):
    """AdamW's settings."""

    learning_rate: Number = Field(1e-4, gt=0, le=10, description="peak learning rate of AdamW")
    weight_decay: Number = Field(0.01, ge=0, le=10, description="decoupled weight decay of AdamW")
    weight_decay_on: Literal["matrices", "all"] = Field(
        "matrices",
        description="weights that decay: matrices, or (as HLLM) norms, biases and logit_scale too",
    )
    modal_lr: Number | None = Field(
        None,
        gt=0,
        le=10,
        description="peak learning rate of the weights that decay_check_name names (HLLM's key), in "
        "place of learning_rate; the four keys go together",
    )
    modal_decay: Number | None = Field(
        None, ge=0, le=10, description="weight decay of these weights, in place of weight_decay"
    )
    rec_lr: Number | None = Field(
        None, gt=0, le=10, description="peak learning rate of the other weights"
    )
    rec_decay: Number | None = Field(
        None, ge=0, le=10, description="weight decay of the other weights"
    )


class SchedulerArgs(_Section):
    """Learning-rate schedule, advanced once per optimizer step."""

    type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay after the warm-up"
    )
    warmup: Number = Field(
        0.1, ge=0, le=1, description="share of all optimizer steps spent in linear warm-up"
    )
    warmup_from_zero: Bool = Field(
        False,
        description="begin the warm-up with a step of learning rate 0, as HLLM; False begins with "
        "the first share of the peak",
    )


class SasrecArgs(_Section):
    """Shape of the SASRec baseline (`model: sasrec`)."""

    hidden_size: PositiveInt = Field(
        64, le=65_536, description="width of item embeddings and layers"
    )
    layers: PositiveInt = Field(2, le=1000, description="number of self-attention layers")
    heads: PositiveInt = Field(2, description="attention heads; must divide hidden_size")
    dropout: Number = Field(0.5, ge=0, lt=1, description="dropout probability")
    block: Literal["transformer", "ligr"] = Field(
        "transformer",
        description="kind of layers: pre-norm transformer, or LiGR's gated ones as in eSASRec",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> SasrecArgs:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"sasrec.heads ({self.heads}) must divide sasrec.hidden_size ({self.hidden_size})"
            )
        return self


class HstuArgs(_Section):
    """Shape of HSTU (`model: hstu`)."""

    hidden_size: PositiveInt = Field(
        512, le=65_536, description="width of the layers, HLLM's hstu_embedding_size"
    )
    layers: PositiveInt = Field(2, le=1000, description="number of layers, HLLM's n_layers")
    heads: PositiveInt = Field(
        4, description="attention heads, HLLM's n_heads; must divide hidden_size"
    )
    dropout: Number = Field(
        0.1,
        ge=0,
        lt=1,
        description="dropout probability of each layer's gated output, HLLM's hidden_dropout_prob",
    )
    input_dropout: Number = Field(
        0.0, ge=0, lt=1, description="dropout probability of what the first layer reads"
    )
    item_width: PositiveInt | None = Field(
        None,
        le=65_536,
        description="dimensions of the trained item vectors, HLLM's item_embedding_size, which a "
        "linear map brings to hidden_size; default: hidden_size, without a map",
    )
    position_bias: Bool = Field(
        True,
        description="add a trained bias for the distance of two items to their attention; the bias "
        "for their gap in time is use_timestamps",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> HstuArgs:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hstu.heads ({self.heads}) must divide hstu.hidden_size ({self.hidden_size})"
            )
        return self


class LlmIdArgs(_Section):
    """The LLM on item ids (`model: llm_id`)."""

    item_width: PositiveInt | None = Field(
        512,
        le=65_536,
        description="dimensions of the trained item vectors, HLLM's item_embed_dim, which a linear "
        "map brings to the LLM's; null: the LLM's, without a map",
    )


def _key(default: Any, group: str, description: str, **limits: Any) -> Any:
    if isinstance(default, list | BaseModel):
        return Field(
            default_factory=lambda: default.copy() if isinstance(default, list) else default,
            description=description,
            json_schema_extra={"group": group},
            **limits,
        )
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


def _resolved_negatives(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `negatives` and the keys with it become, of the values that were given."""
    negatives = values.get("negatives", "auto")
    if negatives not in ("auto", "in_batch"):
        return {}
    if values.get("num_negatives") is not None:
        return {"negatives": "sampled"}
    if negatives == "in_batch":
        return {}
    if values.get("model", "HLLM") != "HLLM" or values.get("loss", "nce") != "nce":
        return {"negatives": "in_batch"}
    return {
        "negatives": "sampled",
        "num_negatives": AUTO_NUM_NEGATIVES,
        "negatives_logq": values.get("negatives_logq", True),
    }


class Config(_Section):
    """The merged configuration of one run. Frozen: nothing changes it after loading.

    Relative paths are relative to the folder the program is started in.
    """

    # --- run
    model: Literal[
        "HLLM", "pop", "random", "item_knn", "tfidf", "sasrec", "hstu", "llm_id", "ensemble"
    ] = _key(
        "HLLM",
        "run",
        "what ranks the items: HLLM's UserLLM, a model on item ids (sasrec, hstu, llm_id) or another "
        "reference on the same split, or an ensemble of finished runs",
    )
    runs: Runs | None = _key(
        None,
        "run",
        "model: ensemble: folders of the two or three finished runs whose scores are summed",
    )
    val_only: Bool = _key(False, "run", "evaluate only, without training")
    check: Bool = _key(
        False,
        "run",
        "check configuration, files, every row, ids, model folders, disk and memory without loading "
        "an LLM's weights, print all problems at once, and stop",
    )
    dry_run: Bool = _key(
        False,
        "run",
        "print the estimated GPU memory, and the largest train_batch_size and the time of an epoch for "
        "cards of 6 to 24 GiB, or with val_only those of the evaluation, then stop; loads no weights, "
        "and says what it assumes where the model folder, item cache or interactions are not there yet",
    )
    seed: Int = _key(2020, "run", "seed of every random choice", ge=0, le=2**31 - 1)
    checkpoint_dir: Text = _key("saved", "run", "folder that holds one folder per run")
    run_name: Text | None = _key(
        None,
        "run",
        "the run's folder inside checkpoint_dir; default: dataset and kind of run, "
        "with a number when that exists",
    )
    overwrite: Bool = _key(False, "run", "replace an existing run folder named by run_name")
    auto_resume: Bool = _key(
        False,
        "run",
        "go on from the last complete checkpoint of the unfinished run named by run_name, or else "
        "of the latest unfinished one of this dataset and kind with the same configuration; "
        "without one, start a new run",
    )
    checkpoint_every: Int = _key(
        0, "run", "optimizer steps between resumable checkpoints; 0: none by steps", ge=0
    )
    checkpoint_minutes: Number = _key(
        10.0,
        "run",
        "minutes between resumable checkpoints, besides the one at each epoch's end; 0: none by "
        "time",
        ge=0,
    )
    keep_last: PositiveInt = _key(2, "run", "resumable checkpoints kept", le=1000)
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = _key(
        "auto",
        "run",
        "where the model runs; cuda: NVIDIA GPUs, and AMD's with a ROCm build of torch; xpu: Intel "
        "GPUs, and mps: Apple's, both not tried yet; auto: cuda where there is one, else cpu",
    )
    num_threads: Int | None = _key(
        None, "run", "CPU threads of torch; default: torch's own choice", ge=1, le=1024
    )
    show_progress: Bool = _key(True, "run", "show live progress with rate and ETA")
    log_wandb: Bool = _key(
        False,
        "run",
        "send the scalars of training to Weights & Biases too, beside TensorBoard; needs the package "
        "wandb",
    )
    wandb_project: Text | None = _key(
        None, "run", "project at Weights & Biases; default: W&B's own choice (WANDB_PROJECT)"
    )
    log_mlflow: Bool = _key(
        False,
        "run",
        "send the scalars of training and the configuration to MLflow too (MLFLOW_TRACKING_URI); "
        "needs the package mlflow-skinny or mlflow",
    )
    mlflow_experiment: Text | None = _key(
        None, "run", "experiment at MLflow; default: that of MLFLOW_EXPERIMENT_NAME, else Default"
    )
    trust_remote_code: Bool = _key(
        False, "run", "let transformers run Python code found in a model folder"
    )

    # --- data
    data_path: Text = _key(
        "dataset", "data", "folder of the interaction files <dataset>.csv, or .parquet"
    )
    dataset: Annotated[Text | None, AfterValidator(_plain_name)] = _key(
        None, "data", "name of the dataset, for example Pixel200K"
    )
    item_data: Annotated[Text | None, AfterValidator(_plain_name)] = _key(
        None,
        "data",
        "the catalogue that items are ranked in: the items of data_path/<item_data>.csv, which needs "
        "an item_id column, and those of the interactions; default: the latter alone",
    )
    text_path: Text = _key(
        "information",
        "data",
        "item information: a folder of <dataset>.csv (or .parquet) files, or one such file",
    )
    text_keys: UniqueTexts = _key(
        ["title", "tag", "description"], "data", "columns of the item text, in order"
    )
    MAX_ITEM_LIST_LENGTH: PositiveInt = _key(
        50, "data", "longest history that the UserLLM reads, in items", le=100_000
    )
    MAX_ITEM_LIST_LENGTH_TEST: PositiveInt | None = _key(
        None,
        "data",
        "longest history that is read in evaluation and to recommend, in items; default: "
        "MAX_ITEM_LIST_LENGTH",
        le=100_000,
    )
    MAX_TEXT_LENGTH: PositiveInt = _key(
        64, "data", "longest item text, in tokens, prompt included", le=100_000
    )
    missing_items: Literal["error", "drop"] = _key(
        "error", "data", "what to do with interactions whose item is not in the cache"
    )
    tie_order: Literal["file", "shuffle"] = _key(
        "file",
        "data",
        "order of a user's interactions with one timestamp: that of the file, or drawn with seed",
    )
    split: Literal["leave_one_out", "global_time"] = _key(
        "leave_one_out",
        "data",
        "what is held out: leave_one_out, each user's last item for test and the one before for "
        "validation; global_time, what comes after a time that is the same for all users, so that "
        "training sees nothing later",
    )
    split_time: SplitTime | None = _key(
        None,
        "data",
        "split: global_time: where the test period begins: a share of the interactions between 0 and 1, "
        "a date (UTC), or a timestamp as in the data; default: 0.9",
    )
    split_valid_time: SplitTime | None = _key(
        None,
        "data",
        "split: global_time: where the validation period begins, and training ends, likewise; default: "
        "as many interactions before split_time as come after it",
    )
    split_cold: Literal["leave_out", "rank"] = _key(
        "leave_out",
        "data",
        "split: global_time: items first seen after training, and users first seen in a period: left "
        "out, or ranked, such a user from the second item on",
    )
    data_split: Annotated[Bool, BeforeValidator(_data_split)] = _key(
        True,
        "data",
        "cut training histories longer than MAX_ITEM_LIST_LENGTH + 1 into pieces of that length; "
        "False: train on the last piece alone (HLLM's key); leave_one_out or global_time is taken for "
        "split",
    )
    num_workers: Int = _key(
        0, "data", "processes that prepare batches; 0 prepares them in the main one", ge=0, le=256
    )

    # --- item cache
    use_item_cache: Bool = _key(
        True, "item cache", "read item embeddings from item_cache_path; False encodes them now"
    )
    item_cache_path: Text | None = _key(
        None,
        "item cache",
        "cache file; default: <data_path>/<dataset in lower case>_item_embeddings.safetensors",
    )
    item_pretrain_dir: Text | None = _key(None, "item cache", "model folder of the ItemLLM")
    encoder: Text | None = _key(
        None,
        "item cache",
        "folder of a sentence encoder, in sentence-transformers' layout or of BERT's kind, in place "
        "of item_pretrain_dir: texts are sentences, with the folder's own prompt, pooling and length",
    )
    item_prompt: Text = _key(
        "Compress the following sentence into embedding: ",
        "item cache",
        "text put before every item's text",
    )
    text_format: Literal["plain", "hllm", "sentences"] = _key(
        "plain",
        "item cache",
        "plain: cells of the item information as they are; hllm: as pandas reads them in HLLM's code "
        "(NA, None and null are blank, 1990 may be 1990.0, 0 is left out, an item without values has "
        "the prompt alone); sentences: the values alone, joined by '. '",
    )
    item_emb_token_n: Int = _key(
        1,
        "item cache",
        "1: HLLM's learned emb token is the last position; 0: mean pooling. A model folder "
        "without a trained emb token is mean-pooled, and the log says so",
        ge=0,
        le=1,
    )
    item_cache_dtype: DType = _key("float16", "item cache", "number type stored in the cache")
    item_batch_tokens: PositiveInt | None = _key(
        None,
        "item cache",
        "tokens encoded at a time, padding included; default: 8192 on a GPU, 2048 on a CPU",
        le=10_000_000,
    )
    item_compile: Bool = _key(False, "item cache", "encode items with torch.compile")
    item_embedding_transform: Literal["none", "standardize", "whiten"] = _key(
        "none",
        "item cache",
        "fixed map applied to the cached embeddings at load: none as HLLM, per-dimension "
        "standardisation, or PCA whitening; for ItemLLMs that were not trained to embed",
    )
    item_adapter: Literal["none", "linear", "mlp", "lowrank"] = _key(
        "none",
        "item cache",
        "trainable map on cached embeddings, of inputs and targets alike; from a cache of another "
        "width than the UserLLM's it is a projection, which starts as PCA",
    )
    item_adapter_rank: PositiveInt = _key(
        64, "item cache", "rank of item_adapter: lowrank", le=65_536
    )
    item_id_embedding: Bool = _key(
        False,
        "item cache",
        "add a trained vector per item, which starts at zero, to the item's text vector, in inputs "
        "and targets alike; items that were not trained have none",
    )
    item_id_dropout: Number = _key(
        0.0,
        "item cache",
        "share of item_id_embedding's vectors left out in training, drawn for every occurrence of "
        "an item, so that its text vector ranks by itself",
        ge=0,
        lt=1,
    )
    item_dropout: Number = _key(
        0.0, "item cache", "dropout on the item vectors that the UserLLM reads", ge=0, lt=1
    )

    # --- training the ItemLLM
    train_item_llm: Literal["none", "lora", "full"] = _key(
        "none",
        "training the ItemLLM",
        "train the ItemLLM of item_pretrain_dir (or encoder) along with the UserLLM: the items of a "
        "batch are encoded in every step. none reads the cache; lora trains a LoRA adapter and the "
        "emb token, full every weight. Each validation encodes the catalogue, and that of the best "
        "epoch is kept in the run's folder",
    )
    item_llm_init: Bool = _key(
        True,
        "training the ItemLLM",
        "begin with the weights in item_pretrain_dir; False reads that folder's config.json and "
        "tokenizer alone and begins with random ones, drawn by seed, emb token included "
        "(train_item_llm: full)",
    )
    item_pretrain_epochs: Int = _key(
        0,
        "training the ItemLLM",
        "before anything else, train the ItemLLM alone for N epochs: items that follow each other in a "
        "training history are alike, the others of the batch are not; LoRA, or every weight with "
        "train_item_llm: full. The catalogue is then encoded once",
        ge=0,
        le=100_000,
    )
    item_pretrain_batch_size: PositiveInt = _key(
        256,
        "training the ItemLLM",
        "pairs of items per process and optimizer step of item_pretrain_epochs",
        le=1_000_000,
    )
    item_lora_r: PositiveInt = _key(8, "training the ItemLLM", "LoRA rank", le=4096)
    item_lora_alpha: PositiveInt = _key(
        16, "training the ItemLLM", "LoRA alpha; the update is scaled by alpha/r"
    )
    item_lora_dropout: Number = _key(
        0.05, "training the ItemLLM", "dropout on LoRA's input", ge=0, lt=1
    )
    item_lora_target_modules: UniqueTexts = _key(
        ["q_proj", "v_proj"],
        "training the ItemLLM",
        "names of the ItemLLM's linear layers that get LoRA, or [all-linear]",
    )
    item_quant_type: Literal["nf4", "none"] = _key(
        "none",
        "training the ItemLLM",
        "quantisation of the frozen weights under LoRA; none keeps them in the number type of "
        "precision",
    )
    item_lr_mult: Number = _key(
        1.0,
        "training the ItemLLM",
        "the ItemLLM's learning rate as a multiple of optim_args.learning_rate",
        gt=0,
        le=1000,
    )
    item_freeze_layers: Int = _key(
        0,
        "training the ItemLLM",
        "keep the first N layers as they are, with the embeddings and the emb token below them: no "
        "gradient is computed for them",
        ge=0,
    )
    item_freeze_embeddings: Bool = _key(
        False,
        "training the ItemLLM",
        "keep the token embeddings as they are (train_item_llm: full)",
    )
    item_gradient_checkpointing: Bool = _key(
        False,
        "training the ItemLLM",
        "recompute the ItemLLM's activations in the backward pass to save memory",
    )
    item_chunk_tokens: PositiveInt = _key(
        2048,
        "training the ItemLLM",
        "tokens of item texts that go through the ItemLLM at a time in training, padding included: "
        "decides its memory, not the gradient",
        le=10_000_000,
    )

    # --- UserLLM
    user_pretrain_dir: Text | None = _key(None, "UserLLM", "model folder of the UserLLM")
    user_llm_init: Bool | None = _key(
        None,
        "UserLLM",
        "begin with the weights in user_pretrain_dir; False reads that folder's config.json alone and "
        "begins with random ones, drawn by seed; default: True, False for model: llm_id",
    )
    load_pretrain: Text | None = _key(
        None,
        "UserLLM",
        "a checkpoint of HLLM (pytorch_model.bin) to begin with: the weights of both LLMs, the emb "
        "token and logit_scale; config.json and tokenizer are those of user_pretrain_dir and "
        "item_pretrain_dir. It is imported into model folders beside the file, once",
    )
    user_llm_layers: Int | None = _key(
        None, "UserLLM", "keep the first N decoder layers; default: all of them", ge=1
    )
    residual_items: Int = _key(
        0,
        "UserLLM",
        "start a user's vector as the weighted sum of so many last items' vectors, and add the "
        "UserLLM's output through a trained map that is zero at first; for items whose neighbours are "
        "alike, and data too small to learn that from. 0: the output alone, as in HLLM, or the map that "
        "an exported model comes with, kept as it is. Without effect with val_only and other models",
        ge=0,
        le=64,
    )
    use_timestamps: Bool = _key(
        False,
        "UserLLM",
        "add trained embeddings of every item's date, hour and distance from the item before to what "
        "the UserLLM reads, or in model: hstu a trained bias for every gap in time to the attention; "
        "timestamps have to be dates",
    )
    predict_at: Literal["unknown", "target"] = _key(
        "unknown",
        "UserLLM",
        "with use_timestamps: unknown predicts without knowing for when; target tells every position "
        "the time of its next item, in evaluation that of the held-out one, as of a request that "
        "comes then",
    )
    attn_implementation: Literal["auto", "varlen", "sdpa", "flash_attention_2", "eager"] = _key(
        "auto",
        "UserLLM",
        "attention kernel; auto takes varlen, torch's variable-length kernel, where it can run "
        "(NVIDIA GPUs of compute capability 8.0 and later, 16-bit, models without sliding windows), "
        "else flash_attention_2 where it is installed and can run, else sdpa, or eager for a model "
        "that has no sdpa",
    )
    compile: Literal["auto", "off", "layers", "graph", "layers_graph"] = _key(
        "auto",
        "UserLLM",
        "fewer kernel launches in training: layers compiles the decoder layers with torch.compile; "
        "graph captures whole steps as CUDA graphs (one process, attn_implementation: varlen, no "
        "gradient_checkpointing); layers_graph does both, for long runs; auto: graph where it can run "
        "and the run is not too short, else off",
    )
    use_ft_flash_attn: Bool = _key(
        True, "UserLLM", "HLLM's switch: False keeps attn_implementation auto from flash-attn"
    )
    gradient_checkpointing: Bool = _key(
        False, "UserLLM", "recompute activations in the backward pass to save memory"
    )
    use_qlora: Bool = _key(
        False, "UserLLM", "train a LoRA adapter on a quantised UserLLM; False trains all weights"
    )
    qlora_r: PositiveInt = _key(8, "UserLLM", "LoRA rank", le=4096)
    qlora_alpha: PositiveInt = _key(16, "UserLLM", "LoRA alpha; the update is scaled by alpha/r")
    qlora_dropout: Number = _key(0.05, "UserLLM", "dropout on LoRA's input", ge=0, lt=1)
    qlora_target_modules: UniqueTexts = _key(
        ["q_proj", "v_proj"],
        "UserLLM",
        "names of the linear layers that get LoRA, or [all-linear]",
    )
    qlora_quant_type: Literal["auto", "nf4", "fp4", "int8", "none"] = _key(
        "nf4",
        "UserLLM",
        "quantisation of the frozen weights; none is plain LoRA; auto is none where a CUDA card holds "
        "a training step with plain weights, by the estimate of dry_run, and else nf4",
    )
    qlora_compute_dtype: Literal["auto", "float16", "bfloat16", "float32"] = _key(
        "auto", "UserLLM", "number type of the quantised layers' products; auto follows precision"
    )
    qlora_double_quant: Bool = _key(
        True,
        "UserLLM",
        "quantise the quantisation constants too (nf4 and fp4); training holds them in float32, as "
        "rounded",
    )

    # --- training
    loss: Literal["bce", "nce"] = _key(
        "nce",
        "training",
        "bce: binary cross-entropy on dot products; nce: HLLM's InfoNCE on scaled cosines",
    )
    negatives: Negatives = _key(
        "auto",
        "training",
        "what the positive is contrasted with: the batch's other targets, num_negatives items "
        "drawn from the catalogue, MAX_ITEM_LIST_LENGTH + 1 drawn items per sequence (HLLM without "
        "num_negatives), or every item (nce only: a full softmax). auto: sampled with num_negatives; "
        f"without, for model: HLLM with loss: nce, sampled, num_negatives {AUTO_NUM_NEGATIVES} and "
        "negatives_logq True, else in_batch. A run's config.yaml has what auto became",
    )
    num_negatives: Int | None = _key(
        None,
        "training",
        "drawn negatives per forward pass over all processes, shared by its sequences; setting it "
        "implies negatives: sampled, also for models on item ids, whose softmax is full without",
        ge=1,
        le=10_000_000,
    )
    negatives_exclude: Literal["history", "none"] = _key(
        "history",
        "training",
        "items that are not drawn as negatives for a sequence: its user's training items, or none "
        "(HLLM with num_negatives)",
    )
    negatives_logq: Bool = _key(
        False,
        "training",
        "correct nce for how often each item comes up as a negative (log Q), so that frequent items "
        "are not pushed down; drawn negatives are then joined by the batch's other targets. True by "
        "default where negatives: auto draws without num_negatives",
    )
    similarity: Literal["auto", "cosine", "dot"] = _key(
        "auto",
        "training",
        "how user and item vectors are compared in scoring; auto: dot product for what bce trained, "
        "cosine for nce and for an untrained UserLLM, as HLLM was trained",
    )
    nce_thres: Number = _key(
        0.99,
        "training",
        "negatives with a cosine to the positive above this are masked",
        gt=0,
        le=1.01,
    )
    temperature: Number | None = _key(
        None,
        "training",
        "what nce's cosines are divided by, at the start; default: the model folder's own, else "
        "HLLM's 0.07",
        ge=0.01,
        le=1,
    )
    fix_temp: Bool = _key(
        False, "training", "keep the temperature as it starts; else nce trains it"
    )
    train_positions: Literal["all", "random_split"] = _key(
        "all",
        "training",
        "all: every position predicts its next item; random_split: one random split point per "
        "sequence and epoch, as the published HSFT",
    )
    logits_budget_mb: PositiveInt = _key(
        256, "training", "largest block of logits held at once, in MiB"
    )
    epochs: PositiveInt = _key(10, "training", "passes over the training sequences", le=100_000)
    train_batch_size: BatchSize = _key(
        8,
        "training",
        "sequences per process and forward pass; auto chooses a power of two by the GPU's memory, or on "
        "a processor by what the catalogue costs, and leaves the run 500 optimizer steps "
        "(docs/method.md)",
    )
    gradient_accumulation_steps: PositiveInt = _key(
        1, "training", "forward passes per optimizer step", le=100_000
    )
    loss_mean: Literal["positions", "batches"] = _key(
        "positions",
        "training",
        "what has the same weight in an optimizer step: every position, or (as HLLM) every batch of "
        "every process, however many positions it has",
    )
    clip_grad_norm: Number = _key(
        1.0, "training", "largest gradient norm; 0 turns clipping off", ge=0
    )
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged_adamw8bit"] = _key(
        "auto",
        "training",
        "auto is adamw, torch's, a single kernel on CUDA; the 8-bit ones keep their states in fewer "
        "bytes, which for LoRA is little",
    )
    optim_args: OptimArgs = _key(OptimArgs(), "training", "AdamW's settings")
    freeze_prefix: NamePrefixes = _key(
        [],
        "training",
        "beginnings of the names of parameters that are kept as they are, by HLLM's names: user_llm, "
        "user_llm.model.layers.0., item_llm, item_emb_tokens, logit_scale",
    )
    lr_mult_prefix: NamePrefixes = _key(
        [],
        "training",
        "beginnings of the names of parameters whose learning rate is lr_mult_rate times the others'",
    )
    lr_mult_rate: Number | None = _key(
        None, "training", "that multiple of the learning rate", gt=0, le=1e6
    )
    decay_check_name: Text | None = _key(
        None,
        "training",
        "part of the names of parameters that take optim_args.modal_lr and modal_decay; the others take "
        "rec_lr and rec_decay",
        min_length=1,
    )
    scheduler_args: SchedulerArgs = _key(SchedulerArgs(), "training", "learning-rate schedule")
    strategy: Literal["ddp", "deepspeed"] = _key(
        "ddp", "training", "how several processes share the work"
    )
    stage: Literal[0, 1, 2, 3] = _key(2, "training", "ZeRO stage of strategy: deepspeed")
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true", "bf16-true"] = _key(
        "auto",
        "training",
        "Lightning Fabric's precision; auto: bf16-mixed as HLLM where the hardware computes in "
        "bfloat16, else 16-mixed on a GPU and 32-true on a CPU",
    )
    pack_sequences: Bool = _key(
        True,
        "training",
        "put several sequences of a batch into one row, so that little is padding; the loss is the "
        "same; left off, with a line in the log, for LLMs that would mix the sequences of a row (OPT, "
        "BLOOM)",
    )
    group_by_length: Bool = _key(
        False,
        "training",
        "batch sequences of similar length; less padding without pack_sequences, but users with "
        "histories alike in length then always meet each other in a batch",
    )

    # --- evaluation
    eval_batch_size: PositiveInt = _key(256, "evaluation", "users scored at a time", le=1_000_000)
    ranking_precision: Literal["float32", "tensor_cores"] = _key(
        "float32",
        "evaluation",
        "products of full ranking: float32, or on CUDA tensor_cores, TF32 with float64 for the items "
        "whose score is too near the target's to tell; ranks are exact either way",
    )
    topk: Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_not_repeated)] = _key(
        [5, 10, 20], "evaluation", "cut-offs K of the metrics"
    )
    metrics: Annotated[
        list[MetricName],
        Field(min_length=1),
        AfterValidator(_not_repeated),
    ] = _key(
        ["Recall", "NDCG"],
        "evaluation",
        "metrics reported at every K, AUC and GAUC over the whole ranking; with one held-out item a "
        "user HitRate equals Recall, MAP equals MRR, and GAUC equals AUC",
    )
    list_metrics: Bool = _key(
        False,
        "evaluation",
        "measure the recommended lists too, at every K of the final evaluation: coverage, Gini index, "
        "entropy, popularity, tail, novelty, popularity lift and intra-list similarity (docs/method.md)",
    )
    metric_decimal_place: Int = _key(
        6,
        "evaluation",
        "decimals of the table at a run's end; result.json has the metrics unrounded",
        ge=1,
        le=17,
    )
    valid_metric: Text = _key(
        "NDCG@10", "evaluation", "validation metric that picks the best epoch and stops early"
    )
    valid_users: PositiveInt | None = _key(
        None,
        "evaluation",
        "users of each validation, a sample drawn once by seed; default: all. The final evaluation is "
        "always of all users",
    )
    valid_tie: Literal["earlier", "later"] = _key(
        "earlier",
        "evaluation",
        "which of two epochs with the same validation metric is kept; later, as HLLM, counts as an "
        "improvement",
    )
    eval_step: PositiveInt = _key(1, "evaluation", "epochs between validations")
    stopping_step: PositiveInt = _key(
        5, "evaluation", "validations without improvement before training stops"
    )
    eval_protocol: Literal["full", "sampled"] = _key(
        "full",
        "evaluation",
        "full: rank the whole catalogue with seen items masked; sampled: rank the target among "
        "eval_neg_sample_num drawn items (the published HSFT protocol)",
    )
    eval_neg_sample_num: PositiveInt = _key(
        99, "evaluation", "drawn candidates per user of eval_protocol: sampled", le=1_000_000
    )
    eval_phase: Literal["test", "valid"] = _key(
        "test",
        "evaluation",
        "held-out items of the final evaluation; valid lets settings be compared without the test "
        "items being looked at",
    )
    eval_baseline: Bool = _key(
        True, "evaluation", "before fine-tuning, evaluate the untrained UserLLM for the table"
    )

    # --- reference models
    sasrec: SasrecArgs = _key(SasrecArgs(), "reference models", "shape of model: sasrec")
    hstu: HstuArgs = _key(HstuArgs(), "reference models", "shape of model: hstu")
    llm_id: LlmIdArgs = _key(
        LlmIdArgs(), "reference models", "settings of model: llm_id; the LLM is user_pretrain_dir's"
    )
    knn_history: Literal["last", "mean"] = _key(
        "last",
        "reference models",
        "model: item_knn and tfidf rank by cosine to the last item or to the mean of the history",
    )
    knn_decay: Number = _key(
        1.0,
        "reference models",
        "weight of an item in that mean relative to the next newer one; 1: all count the same",
        gt=0,
        le=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_negatives(cls, values: Any) -> Any:
        """Replace `negatives: auto`, so that a run stores what it trains with."""
        return values | _resolved_negatives(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _keys_agree(self) -> Config:
        match = METRIC_PATTERN.match(self.valid_metric)
        if not match:
            raise ValueError(
                f"valid_metric is {self.valid_metric!r}; write NAME@K with NAME one of "
                f"{', '.join(PER_USER_METRICS)}"
            )
        if match.group(1) not in self.metrics or int(match.group(2)) not in self.topk:
            raise ValueError(
                f"valid_metric is {self.valid_metric}, but metrics {self.metrics} at topk {self.topk} "
                f"do not contain it; change one of them"
            )
        if self.split == "leave_one_out":
            for key in ("split_time", "split_valid_time", "split_cold"):
                if getattr(self, key) not in (None, "leave_out"):
                    raise ValueError(f"{key} belongs to split: global_time; set it or drop {key}")
        elif self.split_cold == "leave_out" and self.item_data is not None:
            raise ValueError(
                "item_data names the catalogue, and split_cold: leave_out leaves only the items that "
                "are trained on; use split_cold: rank, or drop item_data"
            )
        if self.split_cold == "rank" and self.negatives == "catalogue" and self.model == "HLLM":
            raise ValueError(
                "negatives: catalogue contrasts with every item, those first seen after training too, "
                "which split_cold: rank is to rank untouched; use negatives: in_batch, or num_negatives"
            )
        if self.list_metrics and self.eval_protocol != "full":
            raise ValueError(
                "list_metrics are of lists of the whole catalogue, and eval_protocol: sampled ranks "
                "none; use eval_protocol: full or drop list_metrics"
            )
        if "Coverage" in self.metrics and self.eval_protocol != "full":
            raise ValueError(
                "Coverage is of lists of the whole catalogue, and eval_protocol: sampled ranks none; "
                "use eval_protocol: full or take it out of metrics"
            )
        if self.negatives == "catalogue" and self.loss != "nce":
            raise ValueError("negatives: catalogue is a full softmax and needs loss: nce")
        if self.negatives in ("catalogue", "per_sequence") and self.num_negatives is not None:
            raise ValueError(
                f"num_negatives has no meaning with negatives: {self.negatives}; drop one"
            )
        if self.negatives == "sampled" and self.num_negatives is None:
            raise ValueError("negatives: sampled needs num_negatives, for example 512")
        if self.negatives_logq and self.loss != "nce":
            raise ValueError("negatives_logq corrects loss: nce; drop it or the loss")
        if self.negatives_logq and self.negatives == "catalogue":
            raise ValueError(
                "negatives: catalogue contrasts with every item, so that negatives_logq has nothing "
                "to correct; drop one"
            )
        if self.model in ID_MODELS:
            self._id_model_agrees()
        if self.loss == "bce" and (self.fix_temp or self.temperature is not None):
            raise ValueError("fix_temp and temperature belong to loss: nce; drop them or the loss")
        if self.encoder is not None and self.item_pretrain_dir is not None:
            raise ValueError("encoder stands in place of item_pretrain_dir; drop one of them")
        if self.item_id_dropout and not self.item_id_embedding:
            raise ValueError("item_id_dropout needs item_id_embedding: True; set it or drop one")
        if self.trains_items:
            self._item_side_agrees()
        self._start_agrees()
        self._names_agree()
        if self.chooses_batch_size and self.trains:
            self._batch_size_can_be_chosen()
        if self.predict_at != "unknown" and not self.use_timestamps:
            raise ValueError("predict_at needs use_timestamps: True; set it or drop predict_at")
        if self.use_timestamps and self.model not in TIME_MODELS:
            raise ValueError(
                f"use_timestamps belongs to models {', '.join(TIME_MODELS)}, not to {self.model}"
            )
        if self.use_timestamps and self.val_only:
            raise ValueError("use_timestamps adds what is trained; drop it or val_only")
        if self.model == "ensemble" and self.runs is None:
            raise ValueError("model: ensemble needs runs: name two or three finished run folders")
        if self.model != "ensemble" and self.runs is not None:
            raise ValueError(f"runs belongs to model: ensemble, not to {self.model}; drop one")
        if self.loss == "nce" and self.similarity == "dot" and self.model == "HLLM":
            raise ValueError("loss: nce compares by cosine; similarity: dot needs loss: bce")
        return self

    def _batch_size_can_be_chosen(self) -> None:
        obstacle = ""
        if self.strategy == "deepspeed":
            obstacle = "strategy: deepspeed is not, as it shares weights out"
        elif self.trains_items_along:
            obstacle = f"train_item_llm: {self.train_item_llm} is not"
        if obstacle:
            raise ValueError(
                f"train_batch_size: auto goes by the estimates of dry_run, in which {obstacle}; set a "
                f"number"
            )

    def _names_agree(self) -> None:
        """Check the keys that choose parameters by their names."""
        args = self.optim_args
        given = (args.modal_lr, args.modal_decay, args.rec_lr, args.rec_decay)
        if any(value is not None for value in (*given, self.decay_check_name)) and None in (
            *given,
            self.decay_check_name,
        ):
            raise ValueError(
                "decay_check_name goes with optim_args.modal_lr, modal_decay, rec_lr and rec_decay; set "
                "all five or none"
            )
        known = FIRST_NAMES.get(self.model, ())
        for key in ("freeze_prefix", "lr_mult_prefix"):
            for prefix in getattr(self, key) if known else ():
                first, point, _ = prefix.partition(".")
                if not any(name == first if point else name.startswith(first) for name in known):
                    raise ValueError(
                        f"{key}: no parameter of model: {self.model} begins with {prefix!r}; names begin "
                        f"with {', '.join(known)}"
                    )
        if bool(self.lr_mult_prefix) != (self.lr_mult_rate not in (None, 1)):
            raise ValueError("lr_mult_prefix and lr_mult_rate go together; set both or none")
        if self.lr_mult_prefix and self.decay_check_name is not None:
            raise ValueError(
                "lr_mult_prefix and decay_check_name both decide learning rates; drop one, as HLLM "
                "leaves the former out"
            )

    def _start_agrees(self) -> None:
        """Check the keys of the weights that training begins with."""
        if self.load_pretrain is not None and self.model != "HLLM":
            raise ValueError(
                f"load_pretrain is a checkpoint of HLLM, not of model: {self.model}; drop one"
            )
        if self.use_qlora and self.has_user_llm and self.has_random_user_llm:
            raise ValueError(
                "use_qlora adapts an LLM that was trained before, and random weights were not; set "
                "user_llm_init: True or drop use_qlora"
            )
        if not self.has_random_item_llm:
            return
        if self.train_item_llm != "full" or self.encoder is not None:
            raise ValueError(
                "item_llm_init: False begins with a random ItemLLM, all of which has to be trained; use "
                "train_item_llm: full with item_pretrain_dir, or drop item_llm_init"
            )
        if self.item_freeze_layers or self.item_freeze_embeddings:
            raise ValueError(
                "item_llm_init: False begins with random weights, which item_freeze_layers and "
                "item_freeze_embeddings would keep; drop these"
            )

    def _id_model_agrees(self) -> None:
        if self.eval_list_length > self.MAX_ITEM_LIST_LENGTH:
            raise ValueError(
                f"MAX_ITEM_LIST_LENGTH_TEST is more than MAX_ITEM_LIST_LENGTH, and model: {self.model} "
                f"has no trained vector for the positions beyond; raise MAX_ITEM_LIST_LENGTH"
            )
        if self.val_only:
            raise ValueError(
                f"model: {self.model} has nothing to evaluate untrained; drop val_only"
            )
        if self.negatives_logq and self.effective_negatives != "sampled":
            raise ValueError(
                f"negatives_logq needs num_negatives with model: {self.model}, whose softmax is full "
                f"without"
            )
        if self.use_qlora and not self.has_user_llm:
            raise ValueError(
                f"use_qlora adapts the weights of an LLM, and model: {self.model} has none; drop it"
            )
        if self.gradient_checkpointing and not self.has_user_llm:
            raise ValueError(
                f"gradient_checkpointing belongs to an LLM, not to model: {self.model}; drop it"
            )
        by_dot = self.model == "sasrec" if self.similarity == "auto" else self.similarity == "dot"
        if by_dot and (self.fix_temp or self.temperature is not None):
            raise ValueError(
                f"fix_temp and temperature are of cosines, and model: {self.model} is trained with dot "
                f"products here; add similarity: cosine or drop them"
            )
        if self.loss != "nce":
            raise ValueError(
                f"model: {self.model} is trained with loss: nce, a softmax; drop loss: {self.loss}"
            )

    def _item_side_agrees(self) -> None:
        key = f"train_item_llm: {self.train_item_llm}"
        if self.train_item_llm == "none":
            key = f"item_pretrain_epochs: {self.item_pretrain_epochs}"
        if self.model != "HLLM" or self.val_only:
            raise ValueError(f"{key} belongs to the training of model: HLLM; drop it")
        if self.item_pretrain_dir is None and self.encoder is None:
            raise ValueError(
                f"{key} needs the ItemLLM that made the item cache; name it with item_pretrain_dir"
            )
        if self.strategy == "deepspeed":
            raise ValueError(f"{key} runs under strategy: ddp only")
        if self.item_pretrain_epochs and self.precision == "16-mixed":
            raise ValueError(
                "item_pretrain_epochs does not scale losses, as precision: 16-mixed needs; use "
                "bf16-mixed or 32-true"
            )
        if self.train_item_llm == "full" and self.item_quant_type != "none":
            raise ValueError(
                "train_item_llm: full trains every weight, which quantised ones cannot be; use "
                "train_item_llm: lora, or item_quant_type: none"
            )
        if not self.trains_items_along:
            return
        if self.effective_negatives == "catalogue":
            raise ValueError(
                f"{key} encodes the items of a batch, not the whole catalogue that negatives: "
                f"catalogue needs in every step; use negatives: in_batch, or num_negatives"
            )
        if self.compile in ("graph", "layers_graph"):
            raise ValueError(
                f"{key} has steps of changing shapes, which compile: {self.compile} cannot capture; use "
                f"compile: auto"
            )

    @property
    def eval_list_length(self) -> int:
        """Longest history in items that is read in evaluation and to recommend."""
        return self.MAX_ITEM_LIST_LENGTH_TEST or self.MAX_ITEM_LIST_LENGTH

    @property
    def longest_list_length(self) -> int:
        """Longest history in items that is read at all."""
        return max(self.MAX_ITEM_LIST_LENGTH, self.eval_list_length)

    @property
    def chooses_batch_size(self) -> bool:
        """Whether `train_batch_size` is `auto`."""
        return not isinstance(self.train_batch_size, int)

    @property
    def trains_items_along(self) -> bool:
        """Whether the ItemLLM is trained along with the UserLLM."""
        return self.train_item_llm != "none"

    @property
    def trains_items(self) -> bool:
        """Whether the ItemLLM is trained, so that the run has an item cache of its own."""
        return self.trains_items_along or self.item_pretrain_epochs > 0

    @property
    def trains_item_lora(self) -> bool:
        """Whether that is done with LoRA, and not all of its weights."""
        return self.trains_items and self.train_item_llm != "full"

    @property
    def reads_embeddings(self) -> bool:
        """Whether the model knows items by their embeddings, and so needs the item cache."""
        return self.model in READS_EMBEDDINGS

    @property
    def has_user_llm(self) -> bool:
        """Whether an LLM reads the histories, of the shape in `user_pretrain_dir`."""
        return self.model in USER_LLM_MODELS

    @property
    def loads_user_llm(self) -> bool:
        """Whether the weights of `user_pretrain_dir` are read, beside its `config.json`."""
        return self.has_user_llm and not self.has_random_user_llm and self.load_pretrain is None

    @property
    def loads_item_llm(self) -> bool:
        """Whether the weights of `item_pretrain_dir` are read, beside its `config.json`."""
        return not self.has_random_item_llm and self.load_pretrain is None

    @property
    def random_item_seed(self) -> int | None:
        """Seed of the ItemLLM's random weights, None where they are not."""
        return self.seed if self.has_random_item_llm else None

    @property
    def has_random_user_llm(self) -> bool:
        """Whether the LLM that reads the histories begins with random weights."""
        drawn = self.model != "HLLM" if self.user_llm_init is None else not self.user_llm_init
        return self.has_user_llm and drawn and self.load_pretrain is None

    @property
    def has_random_item_llm(self) -> bool:
        """Whether the ItemLLM begins with random weights."""
        return not self.item_llm_init and self.load_pretrain is None

    @property
    def trains(self) -> bool:
        """Whether main.py trains a model, and does not only evaluate one."""
        return self.model in TRAINED_MODELS and not self.val_only

    @property
    def effective_negatives(self) -> Literal["in_batch", "sampled", "catalogue"]:
        """Where negatives come from: `num_negatives` alone means `sampled`, as in HLLM."""
        if self.num_negatives is not None or self.negatives == "per_sequence":
            return "sampled"
        return self.negatives

    @property
    def initial_logit_scale(self) -> float | None:
        """-log(temperature), the log factor on cosines to start from; None without a temperature."""
        return None if self.temperature is None else -math.log(self.temperature)

    def negatives_per_sequence(self, sequences: int) -> int:
        """Return how many items are drawn for each sequence, 0 where none are drawn.

        Args:
            sequences: of one forward pass, over all processes.
        """
        if self.negatives == "per_sequence":
            return self.MAX_ITEM_LIST_LENGTH + 1
        return -(-(self.num_negatives or 0) // sequences)
