"""The ItemLLM: item text in, one embedding per item out, as HLLM encodes items."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsft.encoding.packed import PackedTexts, pack_texts
from hsft.model.accelerate import compile_layers
from hsft.model.attention import VARLEN
from hsft.model.backbone import LoraSettings, add_lora, load_decoder, make_decoder, read_extra
from hsft.model.norms import fuse_norms
from hsft.utils.errors import InputError, brief, one_line
from hsft.utils.files import is_file, sha256
from hsft.utils.host_copy import HostCopy
from hsft.utils.prefetch import prefetch
from hsft.utils.records import remember

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hsft.encoding.prefix import Prefix

log = logging.getLogger(__name__)

_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt")
_READ_WHOLE = 1 << 20
_PAGE = 4096
# How far rounding may move an embedding between two kernels, as a share of its length. A kernel that
# aligns queries and keys otherwise moves it further.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
# What a tokenizer is not made of, and how many bytes of the other files are read to know them again.
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_QUICKLY_READ = 64 << 20
# Of HLLM's emb token before it is trained.
_EMB_TOKEN_DEVIATION = 0.02
_TOKENIZER_PACKAGES = ("tokenizers", "sentencepiece", "tiktoken", "protobuf")

Pooling = Literal["emb_token", "mean", "sentence"]


class _PaddedTexts(NamedTuple):
    """Texts in padded rows: their numbers in the batch, and what `ItemEncoder.embed` takes."""

    rows: np.ndarray
    padded: np.ndarray
    lengths: np.ndarray
    after_prefix: bool


class ItemEncoder:
    """Encodes texts with a frozen LLM.

    With `emb_token` pooling the learned embedding `item_emb_tokens` is appended after the text's
    tokens, and its last hidden state (after the final norm) is the item's embedding. With `mean`
    pooling it is the mean of the last hidden states of the text's tokens. Attention is causal and
    rows are padded on the right, so no position sees another item or a padding position. A model
    with `varlen` attention reads the texts of a batch in a single row.

    Args:
        model: a decoder with its token embedding.
        tokenizer: its tokenizer.
        emb_token: [D] learned embedding for `emb_token` pooling, None for `mean`.
        max_text_length: longest text in tokens.

    Attributes:
        packed: whether the texts of a batch are read in a single row.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, emb_token: Tensor | None, max_text_length: int
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.emb_token = None if emb_token is None else emb_token.to(model.device)
        self.max_text_length = max_text_length
        self.dim = int(model.config.hidden_size)
        # Set back by `share_prefix` where the kernel does not give what padded rows give.
        self.packed = getattr(model.config, "_attn_implementation", None) == VARLEN
        self._compiled = False
        self._forward: Callable[..., Any] = model
        self._prefix: Prefix | None = None

    @property
    def pooling(self) -> Pooling:
        """How token states become one embedding."""
        return "mean" if self.emb_token is None else "emb_token"

    def compile(self) -> None:
        """Run the model through torch.compile (`item_compile`)."""
        if self.packed:
            compile_layers(self.model)
        else:
            self._forward = torch.compile(self.model, dynamic=True)
        self._compiled = True

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's token ids, cut to `max_text_length`: int64 [0..max_text_length]."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), truncation=False, padding=False)["input_ids"]
        return [np.asarray(ids[: self.max_text_length], dtype=np.int64) for ids in encoded]

    def share_prefix(self, tokens: np.ndarray) -> None:
        """Encode what the coming texts begin with once, where that pays: int64 [P] token ids.

        Texts that begin otherwise are encoded whole.
        """
        # Imported here, as transformers takes seconds that --check need not wait for.
        from hsft.encoding.prefix import encode_prefix

        # torch.compile would trace the key-value cache again for each of its sizes.
        self._prefix = None if self._compiled else encode_prefix(self.model, tokens)
        if self.packed:
            self._try_packed(tokens)

    def _try_packed(self, tokens: np.ndarray) -> None:
        """Encode a few tokens packed and padded, and stay with padded rows where they differ."""
        few = np.array([*tokens, 0, 1, 2], dtype=np.int64)
        texts = [few[: len(few) - cut] for cut in (2, 0, 1)] + [few[len(tokens) :]]
        reason = ""
        try:
            packed = self.encode(texts)
            self.packed = False
            padded = self.encode(texts)
            self.packed = True
            furthest = float((packed - padded).norm(dim=1).max() / padded.norm(dim=1).max())
            if not furthest < _TOLERANCE[self.model.dtype]:
                reason = f"embeddings differ by {furthest:.2g} of their length"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels, and models that take no such arguments, raise many
            reason = one_line(error, 160)
        if reason:
            self.packed = False
            log.warning(
                "texts are padded: variable-length attention does not work here (%s).", reason
            )

    @torch.inference_mode()
    def encode(self, tokens: Sequence[np.ndarray]) -> Tensor:
        """Encode one batch.

        Args:
            tokens: token ids of B texts; an empty text is the bare emb token, or under mean
                pooling a zero vector.

        Returns:
            float32 [B, D] on the CPU.
        """
        return self._compute(self._prepare(tokens)).cpu()

    def encode_all(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[Tensor]:
        """Encode batch after batch, in the given order, each as `encode` does.

        On a GPU the next batch is prepared while one is computed, and a batch's embeddings are
        waited for after the next one has been launched.

        Args:
            batches: token ids of texts.
        """
        if self.model.device.type != "cuda":
            # Preparing takes less than a thousandth of the time there, and a thread a core.
            yield from map(self.encode, batches)
        else:
            yield from self._encode_ahead(batches)

    def _encode_ahead(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[Tensor]:
        waiting: HostCopy | None = None
        for prepared in prefetch(map(self._prepare, batches), self.model.device):
            with torch.inference_mode():
                started = HostCopy(self._compute(prepared))
            if waiting is not None:
                yield waiting.read()
            waiting = started
        if waiting is not None:
            yield waiting.read()

    def _prepare(self, tokens: Sequence[np.ndarray]) -> PackedTexts | list[_PaddedTexts]:
        """Lay a batch's texts out; of padded ones, those that begin with the prefix apart."""
        prefix = None if self._prefix is None else self._prefix.tokens
        if self.packed:
            packed = pack_texts(tokens, prefix, emb_token=self.emb_token is not None)
            return packed.pin_memory() if self.model.device.type == "cuda" else packed
        if prefix is None:
            return [_PaddedTexts(np.arange(len(tokens)), *pad(tokens), after_prefix=False)]
        size = len(prefix)
        begins = np.array([np.array_equal(ids[:size], prefix) for ids in tokens], dtype=bool)
        parts = []
        for rows, cut in ((np.flatnonzero(begins), size), (np.flatnonzero(~begins), 0)):
            if len(rows):
                rest = [tokens[row][cut:] for row in rows.tolist()]
                parts.append(_PaddedTexts(rows, *pad(rest), after_prefix=cut > 0))
        return parts

    def _compute(self, texts: PackedTexts | list[_PaddedTexts]) -> Tensor:
        """Encode what `_prepare` returns: float32 [B, D] on the device."""
        device = self.model.device
        if isinstance(texts, PackedTexts):
            return self._embed_row(texts.to(device))
        embedded = [
            self.embed(part.padded, part.lengths, self._prefix if part.after_prefix else None)
            for part in texts
        ]
        if len(texts) == 1:
            return embedded[0]
        embeddings = torch.empty((sum(map(len, embedded)), self.dim), device=device)
        for part, rows in zip(texts, embedded, strict=True):
            embeddings[to_device(part.rows, device)] = rows
        return embeddings

    def _embed_row(self, texts: PackedTexts) -> Tensor:
        inputs = self.model.get_input_embeddings()(texts.ids)
        if self.emb_token is not None:
            inputs = torch.where(
                texts.is_emb_token.unsqueeze(-1), self.emb_token.to(inputs), inputs
            )
        prefix = self._prefix
        given = {"use_cache": False} if prefix is None else prefix.given_for_row(texts.key_index)
        states = self._forward(
            inputs_embeds=inputs,
            position_ids=texts.positions,
            cu_seq_lens_q=texts.cu_lengths,
            cu_seq_lens_k=texts.cu_keys,
            max_length_q=texts.longest,
            max_length_k=texts.longest_keys,
            **given,
        ).last_hidden_state[0]
        pooled = widened(states[texts.pooled])
        width = torch.arange(pooled.shape[1], device=pooled.device)
        counted = width < texts.counts.unsqueeze(1)
        summed = pooled.masked_fill(~counted.unsqueeze(-1), 0.0).sum(dim=1)
        counts = texts.counts
        if prefix is not None and self.emb_token is None:
            summed = summed + prefix.summed * (texts.before > 0).unsqueeze(1)
            counts = counts + texts.before
        return summed / counts.clamp_min(1).unsqueeze(-1)

    def embed(
        self, padded: np.ndarray, lengths: np.ndarray, prefix: Prefix | None = None
    ) -> Tensor:
        """Encode one batch on the model's device, with gradients where they are enabled.

        Args:
            padded: int64 [B, T] token ids, each row a text, padded on the right.
            lengths: int64 [B], tokens of each text.
            prefix: what comes before each of them.

        Returns:
            [B, dim], float32 or float64 as the model's states.
        """
        extra = 0 if self.emb_token is None else 1
        width = max(int(lengths.max(initial=0)) + extra, 1)
        padded = np.pad(padded, ((0, 0), (0, max(0, width - padded.shape[1]))))[:, :width]
        filled = np.arange(width) < lengths[:, None]
        device = self.model.device
        inputs = self.model.get_input_embeddings()(to_device(padded, device))
        ends = to_device(lengths, device)
        rows = torch.arange(len(lengths), device=device)
        if self.emb_token is not None:
            # Not in place: with gradient checkpointing the embeddings require a gradient.
            inputs = inputs.index_put((rows, ends), self.emb_token.to(inputs))
        given = {"use_cache": False} if prefix is None else prefix.given
        states = self._forward(inputs_embeds=inputs, **given).last_hidden_state
        if self.emb_token is not None:
            return widened(states[rows, ends])
        mask = to_device(filled, device).unsqueeze(-1)
        summed = widened(states).masked_fill(~mask, 0.0).sum(dim=1)
        if prefix is not None:
            summed, ends = summed + prefix.summed, ends + len(prefix)
        return summed / ends.clamp_min(1).unsqueeze(-1)


def pad(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Put token ids into one array, padded with 0 on the right.

    Returns:
        int64 [B, T], T the longest text, and int64 [B], the tokens of each.
    """
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    padded = np.zeros((len(tokens), int(lengths.max(initial=0))), dtype=np.int64)
    filled = np.arange(padded.shape[1]) < lengths[:, None]
    padded[filled] = np.concatenate([*tokens, np.empty(0, dtype=np.int64)])
    return padded, lengths


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device, to a GPU without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def widened(states: Tensor) -> Tensor:
    """Return 16-bit numbers as float32, others as they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def load_item_encoder(
    folder: str | Path,
    *,
    item_emb_token_n: int,
    max_text_length: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    tokenizer_as_saved: bool = False,
    lora: LoraSettings | None = None,
    random_seed: int | None = None,
) -> ItemEncoder:
    """Load or make an ItemLLM and decide its pooling.

    Args:
        folder: a transformers model folder; an imported HLLM has `hllm_extra.safetensors` in it.
        item_emb_token_n: 1 asks for the learned emb token; a folder without one is mean-pooled
            and the log says so. 0 asks for mean pooling.
        max_text_length: longest text in tokens.
        device, dtype, attention: where and how the model runs.
        trust_remote_code: let transformers run code from the folder.
        tokenizer_as_saved: see `load_tokenizer`.
        lora: for its quantisation, and the adapter that is added.
        random_seed: draw the weights, with an emb token as HLLM's begins (normally distributed, of
            standard deviation 0.02), in place of the folder's.

    Raises:
        InputError: the model or its tokenizer cannot be loaded.
    """
    given: dict[str, Any] = {
        "dtype": dtype,
        "attention": attention,
        "keep_token_embedding": True,
        "trust_remote_code": trust_remote_code,
    }
    model: Any
    if random_seed is None:
        model = load_decoder(folder, lora=lora, device=device, **given)
    else:
        model = make_decoder(folder, seed=random_seed, **given)
    model = model.to(device)
    if device.type == "cuda":
        fuse_norms(model)
    tokenizer = load_tokenizer(folder, trust_remote_code, as_saved=tokenizer_as_saved)
    dim = int(model.config.hidden_size)
    if random_seed is None:
        token = emb_token(folder, item_emb_token_n, dim)
    else:
        token = _random_emb_token(random_seed, dim) if item_emb_token_n else None
    if token is None and item_emb_token_n:
        log.info("%s", no_emb_token(folder))
    if lora is not None:
        model = add_lora(model, lora, gradient_checkpointing=False)
    return ItemEncoder(model, tokenizer, token, max_text_length)


def load_tokenizer(
    folder: str | Path, trust_remote_code: bool = False, *, as_saved: bool = False
) -> Any:
    """Load a model folder's tokenizer.

    Args:
        folder: the model folder.
        trust_remote_code: let transformers run code from the folder.
        as_saved: run `tokenizer.json`, where there is one, step by step as it says. transformers 4
            does so; transformers 5 puts Llama's steps in the place of the file's, and its tokens
            differ for text that begins with a blank or follows a special token such as `</s>`.

    Raises:
        InputError: there is none, or it does not work.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved = Path(folder) / "tokenizer.json"
    try:
        if as_saved and is_file(saved):
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(saved))
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        tokenizer(["a"], truncation=False, padding=False)["input_ids"]
    except Exception as error:  # transformers raises many kinds for absent or damaged tokenizers
        raise InputError(
            f"model folder {folder} has no usable tokenizer ({brief(error, 160)}); fetch the model again."
        ) from error
    return tokenizer


def check_tokenizer(folder: Path, trust_remote_code: bool = False) -> None:
    """Load a tokenizer to see that it works, unless the same files are known to.

    Raises:
        InputError: as `load_tokenizer`.
    """

    def load() -> bool:
        load_tokenizer(folder, trust_remote_code)
        return True

    files = None if trust_remote_code else _small_files(folder)
    remember("tokenizer works", files, load, packages=_TOKENIZER_PACKAGES)


def _small_files(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each file that is no weights, None where they cannot be read quickly."""
    digests = {}
    size = 0
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHT_FILES:
                size += path.stat().st_size
                if size > _QUICKLY_READ:
                    return None
                digests[path.name] = sha256(path)
    except OSError:
        return None
    return digests


def no_emb_token(folder: str | Path) -> str:
    """Return the sentence that says what a folder without an emb token means."""
    return (
        f"{folder} has no trained emb token (item_emb_tokens): items are mean-pooled over their "
        f"text's tokens."
    )


def emb_token(folder: str | Path, item_emb_token_n: int, dim: int) -> Tensor | None:
    """Return HLLM's learned emb token [D] of a model folder, None for mean pooling.

    Raises:
        InputError: the token is not of the model's dimension.
    """
    if item_emb_token_n == 0:
        return None
    token = read_extra(folder).get("item_emb_tokens")
    if token is None:
        return None
    if token.numel() != dim:
        raise InputError(
            f"{folder}: item_emb_tokens has {token.numel()} dimensions, the model {dim}; import "
            f"the checkpoint again."
        )
    return token.reshape(dim)


def _random_emb_token(seed: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, generator=generator) * _EMB_TOKEN_DEVIATION


def model_fingerprint(folder: str | Path, random_seed: int | None = None) -> str:
    """Return a SHA-256 that tells an ItemLLM from others, whatever its folder's name.

    Of files above 1 MiB it reads the size and 64 pages spread over the file: retrained weights
    differ everywhere, and a model of many gigabytes must not be read a second time.

    Args:
        folder: a model folder.
        random_seed: of weights that are drawn in place of the folder's.

    Raises:
        InputError: the folder or one of its files cannot be read.
    """
    digest = hashlib.sha256()
    if random_seed is not None:
        digest.update(f"random {random_seed}\0".encode())
    try:
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and path.suffix in _MODEL_FILES:
                add_file(digest, path)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} cannot be read: {error.strerror or error}; make the ItemLLM's "
            f"folder readable for whoever runs this, or name another one."
        ) from error
    return digest.hexdigest()


def add_file(digest: Any, path: Path) -> None:
    """Add a file's name, size and content to a hash; of a large one, 64 pages spread over it."""
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        if size <= _READ_WHOLE:
            digest.update(file.read())
            return
        for start in np.linspace(0, size - _PAGE, 64).astype(np.int64).tolist():
            file.seek(start)
            digest.update(file.read(_PAGE))


def length_batches(lengths: np.ndarray, max_tokens: int, extra: int = 0) -> Iterator[np.ndarray]:
    """Split items into batches of similar length within a token budget.

    Args:
        lengths: int [n], tokens of each item.
        max_tokens: largest batch, rows times longest row; a longer item is a batch of its own.
        extra: positions added to each row.

    Yields:
        int64 item positions; longest items first, so that memory peaks at the start.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]) + extra, 1)
        size = max(1, max_tokens // width)
        yield order[start : start + size]
        start += size
