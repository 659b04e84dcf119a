"""The ItemLLM as a module that is trained: item numbers in, item vectors out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hsft.data.cache import ItemCache
from hsft.encoding.build_cache import EncodingJob, encode_tokens
from hsft.encoding.item_llm import ItemEncoder, length_batches
from hsft.encoding.tokens import Tokens
from hsft.model.folder import layer_number
from hsft.model.item_table import FixedMap, Standardize, Whiten
from hsft.model.weights import read_weights, trainable_state
from hsft.utils.errors import InputError

# Files of a trained item side, beside the UserLLM's trained weights.
ITEM_WEIGHTS_FILE = "item_llm.safetensors"
ITEM_CACHE_FILE = "item_cache.safetensors"

# Parts of the names of what lies below the layers.
_EMBEDDINGS = ("embed", "wte", "wpe")

Autocast = Callable[[], AbstractContextManager[object]]


class ItemTower(nn.Module):
    """An ItemLLM with the tokens of a catalogue.

    Args:
        encoder: the ItemLLM. What of it requires a gradient is trained, and its emb token.
        tokens: text i - 1 is that of item number i.
        autocast: makes the context that the ItemLLM computes in.
        chunk_tokens: tokens that are encoded at a time with gradients, padding included.
        transform: a fixed map of the ItemLLM's vectors, applied last.
        train_emb_token: False keeps the emb token as it is.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        tokens: Tokens,
        *,
        autocast: Autocast = nullcontext,
        chunk_tokens: int = 2048,
        transform: FixedMap | None = None,
        train_emb_token: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.tokens = encoder, tokens
        self.autocast, self.chunk_tokens = autocast, chunk_tokens
        self.model = encoder.model
        self.transform = transform
        self.emb_token: nn.Parameter | None = None
        if encoder.emb_token is not None:
            kind = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
            token = encoder.emb_token.detach().to(kind, copy=True)
            self.emb_token = nn.Parameter(token, requires_grad=train_emb_token)
            encoder.emb_token = self.emb_token

    def forward(self, items: np.ndarray) -> Tensor:
        """Encode items in one pass, with gradients where they are enabled.

        Args:
            items: int64 [n], item numbers from 1.

        Returns:
            [n, dim], float32, or float64 where the model is.
        """
        with self.autocast():
            vectors = self.encoder.embed(*self.tokens.padded(items - 1))
        return vectors if self.transform is None else self.transform(vectors)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.encoder.dim

    def chunks(self, items: np.ndarray) -> list[np.ndarray]:
        """Split items into chunks of `chunk_tokens`, of texts of similar length.

        Args:
            items: int64 [n], item numbers.

        Returns:
            int64 item numbers of each chunk.
        """
        extra = 0 if self.emb_token is None else 1
        lengths = self.tokens.lengths[items - 1]
        return [items[rows] for rows in length_batches(lengths, self.chunk_tokens, extra)]

    def encode(
        self, tokens: Tokens, job: EncodingJob, item_ids: list[str], show_progress: bool
    ) -> ItemCache:
        """Encode texts into a cache in memory, without dropout. Collective.

        Args:
            tokens: of n texts; the catalogue's own are `self.tokens`.
            job: for the number type, the batches and the cache's metadata.
            item_ids: n ids.
            show_progress: show a bar.

        Raises:
            InputError: an embedding does not fit in the number type.
        """
        training = self.training
        self.eval()
        try:
            with self.autocast():
                vectors = encode_tokens(
                    self.encoder, tokens, job, item_ids, show_progress=show_progress
                )
        finally:
            self.train(training)
        return self.mapped(ItemCache(item_ids, vectors, {**job.metadata(), **job.origin()}))

    def mapped(self, cache: ItemCache) -> ItemCache:
        """Return a cache with the fixed map applied to its vectors."""
        if self.transform is None:
            return cache
        vectors = copy.deepcopy(self.transform).cpu()(cache.embeddings.float())
        return replace(cache, embeddings=vectors.to(cache.embeddings.dtype))

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained weights by name, and the fixed map's numbers, on the CPU."""
        fixed = {} if self.transform is None else dict(self.transform.named_buffers("transform"))
        values = {**trainable_state(self), **{name: value.cpu() for name, value in fixed.items()}}
        return {name: value.contiguous() for name, value in values.items()}

    def save(self, folder: Path) -> None:
        """Write the trained weights and the fixed map into a folder."""
        save_file(self.trained_state(), folder / ITEM_WEIGHTS_FILE)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote into a tower that was built with the same configuration.

        Raises:
            InputError: the file is missing, damaged, or belongs to another configuration.
        """
        path = folder / ITEM_WEIGHTS_FILE
        stored = read_weights(path, "the run has no trained ItemLLM")
        self.transform = _stored_map(stored)
        if self.transform is not None:
            self.transform.to(self.encoder.model.device)
        expected = {name: value.shape for name, value in self.trained_state().items()}
        stored_shapes = {name: value.shape for name, value in stored.items()}
        if stored_shapes != expected:
            odd = sorted(
                name
                for name in stored_shapes.keys() | expected.keys()
                if stored_shapes.get(name) != expected.get(name)
            )
            raise InputError(
                f"{path} does not fit the ItemLLM in this configuration: it differs in {odd[0]} "
                f"({len(odd)} weights in all); use the run's own config.yaml and ItemLLM."
            )
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name in parameters.keys() & stored.keys():
                parameters[name].copy_(stored[name])


def _stored_map(stored: dict[str, Tensor]) -> FixedMap | None:
    given = {
        name.partition(".")[2]: stored[name] for name in stored if name.startswith("transform.")
    }
    if not given:
        return None
    return Standardize(**given) if "deviation" in given else Whiten(**given)


def freeze(model: nn.Module, layers: int, embeddings: bool) -> None:
    """Keep parts of an ItemLLM as they are.

    Args:
        model: the ItemLLM, with its trainable parts.
        layers: the first of its layers are kept; with them the embeddings, which lie below.
        embeddings: keep the token embeddings.

    Raises:
        InputError: it has no layer beyond those that are kept.
    """
    check_frozen_layers((name for name, _ in model.named_parameters()), layers)
    for name, weight in model.named_parameters():
        number = layer_number(name)
        if number is not None:
            kept = number < layers
        else:
            kept = any(part in name for part in _EMBEDDINGS) and (embeddings or layers > 0)
        if kept:
            weight.requires_grad_(False)


def check_frozen_layers(names: Iterable[str], layers: int) -> None:
    """Refuse to keep all layers of an ItemLLM.

    Args:
        names: of its weights or linear layers.
        layers: the first of its layers are kept.

    Raises:
        InputError: it has no layer beyond those.
    """
    numbers = [number for number in map(layer_number, names) if number is not None]
    count = 1 + max(numbers, default=-1)
    if layers >= count:
        raise InputError(
            f"item_freeze_layers {layers} leaves none of the ItemLLM's {count} layers to train; "
            f"lower it."
        )
