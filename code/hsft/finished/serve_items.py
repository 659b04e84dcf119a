"""Add items to a run that is served: their texts are encoded, or their vectors come along."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hsft.data.cache import ItemCache
from hsft.data.csv_rows import id_problem
from hsft.evaluator.evaluator import Scorer
from hsft.finished.new_items import NewItemEncoder, add_items
from hsft.finished.open_run import OpenRun
from hsft.finished.serve_schema import NewItem
from hsft.model.item_table import table_from_cache
from hsft.model.recommender import Recommender
from hsft.utils.errors import InputError, one_line


def add_new_items(
    run: OpenRun, items: Sequence[NewItem], columns: Sequence[str], encoder: NewItemEncoder
) -> OpenRun:
    """Return a run with more items in its catalogue: first those with texts, then those with vectors.

    Args:
        run: an open run whose model reads item embeddings.
        items: the items.
        columns: of the item information, which texts may have beside those that are encoded.
        encoder: of the run as it was opened; it keeps the ItemLLM.

    Raises:
        InputError: as `new_items.add_items`; or an item has an unusable id, is named twice, has a
            column that there is not, or neither text nor a usable vector. Then none is added.
    """
    run.refuse_new_items()
    if run.index is not None:
        raise InputError(
            f"the server searches the index in {run.index.folder}, which lacks new items; start it "
            f"without --index."
        )
    cache = run.data.cache
    assert cache is not None
    encoded = encoder.config.text_keys
    columns = list(dict.fromkeys([*encoded, *columns]))
    seen: set[str] = set()
    for place, item in enumerate(items):
        _check(item, f"items.{place}", encoded, columns, seen)
        seen.add(item.item_id)
    run.refuse_known([item.item_id for item in items])
    with_vectors = [item for item in items if item.embedding is not None]
    rows = [
        _vector(item, f"items.{place}", cache)
        for place, item in enumerate(items)
        if item.embedding is not None
    ]
    with_texts = [item for item in items if item.embedding is None]
    if with_texts:
        run = _encode(run, with_texts, columns, encoder)
    if with_vectors:
        ids = [item.item_id for item in with_vectors]
        titles = {item.item_id: item.text.get(encoded[0], "") for item in with_vectors}
        run = run.with_items(ItemCache(ids, torch.stack(rows)), titles)
    return run


@dataclass(frozen=True)
class ExtendedModels:
    """The models of a run with more items, ready to be put in the place of the run's.

    Attributes:
        models: name -> model; those that are extended in place are the run's own.
        tables: name -> [I + 1, C], embeddings that such a model reads from then on.
    """

    models: dict[str, Scorer]
    tables: dict[str, Tensor]

    def apply(self) -> dict[str, Scorer]:
        """Extend what is extended in place, and return the models."""
        for name, table in self.tables.items():
            model = self.models[name]
            assert isinstance(model, Recommender)
            model.encoder.items.embeddings = table
        return self.models


def extend_models(run: OpenRun, models: dict[str, Scorer]) -> ExtendedModels:
    """Prepare the models of a run for the items that were added to it.

    Trained models keep their weights where they are and get a longer table of embeddings; reference
    models are built again.

    Args:
        run: the run with the items.
        models: name -> model, as built before.
    """
    cache, ids = run.data.cache, run.data.interactions.item_ids
    assert cache is not None
    extended, tables = dict(models), {}
    shared: Tensor | None = None
    for name, model in models.items():
        if not isinstance(model, Recommender):
            extended[name] = run.build(name)
            continue
        if shared is None:
            transform = run.config.item_embedding_transform
            table = table_from_cache(cache, ids, transform, run.own_items)
            shared = table.to(model.encoder.items.embeddings.device)
        tables[name] = shared
    return ExtendedModels(extended, tables)


def _check(
    item: NewItem, where: str, encoded: Sequence[str], columns: Sequence[str], seen: set[str]
) -> None:
    """Refuse an item whose id or texts cannot be used."""
    problem = id_problem(item.item_id)
    if problem is not None:
        raise InputError(f"{where}.item_id {problem}.")
    if item.item_id in seen:
        raise InputError(f"{where}.item_id '{one_line(item.item_id, 40)}' comes twice; keep one.")
    for column, text in item.text.items():
        if column not in columns:
            raise InputError(
                f"{where}.text: there is no column '{one_line(column, 40)}'; the item information has "
                f"{', '.join(columns)}."
            )
        if "\0" in text:
            raise InputError(f"{where}.text.{column} holds a NUL character; remove it.")
    if item.embedding is None and not any(item.text.get(key, "").strip() for key in encoded):
        raise InputError(
            f"{where} has neither an embedding nor a text to encode; fill in "
            f"{' or '.join(encoded)} under text."
        )


def _vector(item: NewItem, where: str, cache: ItemCache) -> Tensor:
    """Return an item's vector in the number type of the cache: [D]."""
    vector = torch.tensor(item.embedding, dtype=torch.float64).to(cache.embeddings.dtype)
    if len(vector) != cache.dim:
        raise InputError(
            f"{where}.embedding has {len(vector)} numbers, and the run's items have {cache.dim}; "
            f"encode it with the same ItemLLM."
        )
    if not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise InputError(
            f"{where}.embedding is all zeros, or too large for {str(vector.dtype)[6:]}, the number "
            f"type of the item cache; encode it with the same ItemLLM."
        )
    return vector


def _encode(
    run: OpenRun, items: Sequence[NewItem], columns: Sequence[str], encoder: NewItemEncoder
) -> OpenRun:
    """Encode texts as `add_items` does, which reads them from a file, as a text format may need."""
    with tempfile.TemporaryDirectory(prefix="hsft-items-") as folder:
        path = Path(folder) / "items.csv"
        with path.open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, quoting=csv.QUOTE_ALL)
            rows.writerow(["item_id", *columns])
            for item in items:
                rows.writerow([item.item_id, *(item.text.get(key, "") for key in columns)])
        try:
            return add_items(run, path, encoder)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "the request")) from error
