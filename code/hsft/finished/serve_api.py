"""Answers about one run: search, histories, recommendations, similar items."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np

from hsft.config.schema import RAW_TIME_MODELS
from hsft.data.csv_rows import read_header
from hsft.data.files import information_file
from hsft.data.item_text import read_item_titles
from hsft.data.time_fields import unit_scale
from hsft.evaluator.evaluator import Scorer
from hsft.finished.new_items import NewItemEncoder
from hsft.finished.open_run import OpenRun, items_read, read_time
from hsft.finished.serve_batches import Batcher
from hsft.finished.serve_items import add_new_items, extend_models
from hsft.finished.serve_ranking import ListQuery, Ranked, rank_for_histories, rank_similar
from hsft.finished.serve_schema import (
    MOST_RECOMMENDED,
    AddRequest,
    ListRequest,
    RecommendRequest,
    SimilarRequest,
)
from hsft.hub.repository import run_name
from hsft.utils.errors import InputError, one_line

log = logging.getLogger(__name__)

MOST_MATCHES = 20
LONGEST_QUERY = 200
# Their item vectors say nothing of what an item is like.
_WITHOUT_VECTORS = ("pop", "random")
_SEPARATORS = re.compile(r"[,|;]")


class TextSearch:
    """Finds ids and titles by words; of equally good matches those given first come first.

    Args:
        ids: one each.
        titles: one each, or empty.
    """

    def __init__(self, ids: Sequence[str], titles: Sequence[str]) -> None:
        self._by_id = {text.casefold(): entry for entry, text in reversed(list(enumerate(ids)))}
        # Each title and id follows a line break, so that one look says whether either begins with
        # a query.
        self._texts = [
            f"\n{title}\n{text}".casefold() for text, title in zip(ids, titles, strict=True)
        ]

    def search(self, query: str, most: int = MOST_MATCHES) -> list[int]:
        """Return the positions of entries that contain every word of the query, in any case.

        The id that equals the query comes first, then titles or ids that begin with it, then the
        others.

        Args:
            query: words; without any, the first entries are returned.
            most: entries returned at most.
        """
        query = query[:LONGEST_QUERY].casefold().strip()
        words = query.split()
        if not words:
            return list(range(min(most, len(self._texts))))
        matches: Sequence[int] = range(len(self._texts))
        for word in words:
            matches = [entry for entry in matches if word in self._texts[entry]]
        exact = [self._by_id[query]] if query in self._by_id else []
        begin = (entry for entry in matches if f"\n{query}" in self._texts[entry])
        ranked = [*exact, *islice(begin, most), *matches[:most]]
        return list(dict.fromkeys(ranked))[:most]


class Filters:
    """Finds items by values of the item information's columns.

    Args:
        run: the run.
        added: item id -> column -> text of the items that were added to it.
        before: filters of the same run with fewer items, whose columns are not read again.

    Attributes:
        columns: names of the columns, without `item_id`; empty without an information file.
    """

    def __init__(
        self,
        run: OpenRun,
        added: Mapping[str, Mapping[str, str]] | None = None,
        before: Filters | None = None,
    ) -> None:
        config = run.config
        self.columns: list[str] = []
        self._cells: dict[str, dict[str, str]] = {} if before is None else before._cells
        self._numbers: dict[str, Mapping[str, np.ndarray]] = {}
        self._reading = threading.Lock()
        self._ids = [str(item) for item in run.data.interactions.item_ids[1:]]
        self._added = added or {}
        try:
            self._path = information_file(config.text_path, config.dataset)
        except InputError:
            return
        header = read_header(self._path, ["item_id"], "change the first line")
        self.columns = [column for column in dict.fromkeys(header) if column not in ("item_id", "")]

    def items(self, column: str, values: Sequence[str]) -> np.ndarray:
        """Return the numbers of items with one of the values in a column, in any case: int64 [k].

        Raises:
            InputError: there is no such column, or the information file is damaged.
        """
        if column not in self.columns:
            has = f"has {', '.join(self.columns)}" if self.columns else "has none"
            raise InputError(
                f"filter: there is no column '{one_line(column, 40)}'; the item information {has}."
            )
        # A column is read when it is first asked for: descriptions are large.
        with self._reading:
            if column not in self._numbers:
                self._numbers[column] = self._read(column)
        index = self._numbers[column]
        parts = [index[key] for value in values if (key := value.strip().casefold()) in index]
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]))

    def _read(self, column: str) -> Mapping[str, np.ndarray]:
        if column not in self._cells:
            self._cells[column] = read_item_titles(self._path, column)
        cells = self._cells[column]
        numbers: dict[str, list[int]] = {}
        for number, item in enumerate(self._ids, start=1):
            text = self._added[item].get(column, "") if item in self._added else cells.get(item, "")
            parts = {part.strip().casefold() for part in (text, *_SEPARATORS.split(text))}
            for part in parts - {""}:
                numbers.setdefault(part, []).append(number)
        return {part: np.array(each, dtype=np.int64) for part, each in numbers.items()}


class Catalogue:
    """A run's items and what finds them; replaced as a whole when items are added.

    Args:
        run: the run.
        added, before: as for `Filters`; `before` is the catalogue without the last items.

    Attributes:
        run, added: as given.
        filters: finds items by columns.
    """

    def __init__(
        self,
        run: OpenRun,
        added: Mapping[str, Mapping[str, str]] | None = None,
        before: Catalogue | None = None,
    ) -> None:
        data = run.data.interactions
        self.run, self.added = run, added or {}
        self.filters: Filters = Filters(run, self.added, None if before is None else before.filters)
        self._ids = [str(item) for item in data.item_ids]
        self._titles = [run.titles.get(item, "") for item in self._ids]
        counts = np.bincount(data.items, minlength=len(self._ids))
        self._new = counts == 0
        # Item numbers, the most frequent first.
        self._by_frequency = 1 + np.argsort(-counts[1:], kind="stable")
        self._search = TextSearch(
            [self._ids[number] for number in self._by_frequency],
            [self._titles[number] for number in self._by_frequency],
        )

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return len(self._ids) - 1

    def search(self, query: str) -> list[dict[str, Any]]:
        """Return items as `item` does, at most 20, whose title and id contain the query's words."""
        return [self.item(int(self._by_frequency[entry])) for entry in self._search.search(query)]

    def item(self, number: int) -> dict[str, Any]:
        """Return an item's `item_id` and `title`, and `new` where the data have none of it."""
        item: dict[str, Any] = {"item_id": self._ids[number], "title": self._titles[number]}
        return {**item, "new": True} if self._new[number] else item


class ServeApi:
    """Answers about one opened run. Its models are built here.

    Requests that come while the models are in use are computed together.

    Args:
        run: the run.
        topk: recommendations when a request names no number.
        on_batch: called after each forward pass with the number of its requests and its seconds.

    Raises:
        InputError: a model's or the data's files are missing or damaged, or `topk` is out of range.
    """

    def __init__(
        self,
        run: OpenRun,
        topk: int,
        on_batch: Callable[[int, float], None] = lambda requests, seconds: None,
    ) -> None:
        if not 1 <= topk <= MOST_RECOMMENDED:
            raise InputError(
                f"--topk {topk} is out of range for the page; choose 1 to {MOST_RECOMMENDED}."
            )
        data = run.data.interactions
        self._topk = topk
        self._catalogue = Catalogue(run)
        # Of new items; guarded by `_adding`.
        self._encoder: NewItemEncoder | None = None
        self._rows = {str(user): row for row, user in enumerate(data.user_ids)}
        # Shorter ids first, which orders numbers by value.
        self._users = sorted(self._rows, key=lambda user: (len(user), user))
        self._user_search = TextSearch(self._users, [""] * len(self._users))
        self._with_target = [user for user in self._users if data.lengths[self._rows[user]] >= 2]
        self._reads_times = run.config.use_timestamps
        self._time_scale = unit_scale(data, run.config.dataset) if self._reads_times else 1
        self._first_time = int(data.timestamps.min()) // self._time_scale
        self._models: dict[str, Scorer] = {name: run.build(name) for name in run.models}
        self._busy, self._adding = threading.Lock(), threading.Lock()
        largest = run.config.eval_batch_size
        self._recommending = Batcher(self._rank_for_histories, largest, on_batch)
        self._comparing = Batcher(self._rank_similar, largest, on_batch)

    @property
    def _run(self) -> OpenRun:
        return self._catalogue.run

    @property
    def num_items(self) -> int:
        """Number of items that can be recommended."""
        return self._catalogue.num_items

    @property
    def waiting(self) -> int:
        """Number of requests that wait for the models."""
        return self._recommending.waiting + self._comparing.waiting

    def info(self) -> dict[str, Any]:
        """Return what the page says about the run."""
        config, data = self._run.config, self._run.data.interactions
        return {
            "run": run_name(self._run.folder),
            "dataset": config.dataset,
            "models": list(self._models),
            "items": self.num_items,
            "users": data.num_users,
            "max_length": items_read(config, config.eval_list_length) or None,
            "topk": self._topk,
            "most": MOST_RECOMMENDED,
            "reads_times": self._reads_times,
            "predicts_at": self._reads_times and config.predict_at == "target",
            "filters": self._catalogue.filters.columns,
        }

    def items(self, query: str) -> dict[str, Any]:
        """Return at most 20 items whose title and id contain the query's words.

        The item with that id comes first, then titles that begin with the query, then the others,
        each kind by the number of interactions. An empty query finds the most frequent items.
        """
        return {"items": self._catalogue.search(query)}

    def users(self, query: str) -> dict[str, Any]:
        """Return at most 20 user ids that contain the query, with the lengths of their histories."""
        matches = [self._users[entry] for entry in self._user_search.search(query)]
        lengths = self._run.data.interactions.lengths
        return {
            "users": [
                {"user_id": user, "items": int(lengths[self._rows[user]])} for user in matches
            ]
        }

    def user(self, user_id: str) -> dict[str, Any]:
        """Return all items of a user, oldest first.

        Raises:
            InputError: there is no such user.
        """
        numbers, seconds = self._history(user_id)
        history = [self._catalogue.item(int(number)) for number in numbers]
        if self._reads_times:
            for item, second in zip(history, seconds.tolist(), strict=True):
                item["time"] = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"user_id": user_id, "history": history}

    def random_user(self) -> dict[str, Any]:
        """Return the items of a user drawn at random, of those with two items or more."""
        return self.user(random.choice(self._with_target or self._users))

    def recommend(self, request: RecommendRequest) -> dict[str, Any]:
        """Return every model's best items for a user or a history.

        Args:
            request: user or history, and options.

        Returns:
            `models`: a list of `name`, `items` (best first) and, when `find` is given, `found`:
            `rank` among `candidates` items, counted as evaluation does (items of the same score
            come before it), or None where the item is not a candidate.

        Raises:
            InputError: the request names an unknown user, item, model or column, or contradicts
                itself or the run.
            Unavailable: the server ends.
        """
        names = self._model_names(request)
        numbers, times = self._asked_history(request)
        excluded = self._excluded(request)
        find = request.find
        query = ListQuery(
            topk=request.topk or self._topk,
            history=numbers,
            times=times,
            excluded=np.concatenate([excluded, numbers]) if request.exclude_seen else excluded,
            allowed=self._allowed(request),
            diversity=request.diversify,
            find=None if find is None else int(self._run.item_numbers([find])[0]),
        )
        return self._answer(self._recommending.ask((names, query)), find is not None)

    def similar(self, request: SimilarRequest) -> dict[str, Any]:
        """Return the items whose vectors are nearest to an item's, by cosine, for every model.

        Raises:
            InputError: the request names an unknown item, model or column, or the run's model has
                no item vectors.
            Unavailable: the server ends.
        """
        self._require_vectors("similar items")
        names = self._model_names(request)
        number = self._run.item_numbers([request.item])
        query = ListQuery(
            topk=request.topk or self._topk,
            history=number,
            excluded=np.concatenate([self._excluded(request), number]),
            allowed=self._allowed(request),
            diversity=request.diversify,
        )
        return self._answer(self._comparing.ask((names, query)), False)

    def add_items(self, request: AddRequest) -> dict[str, Any]:
        """Add items to the catalogue, all of a request's or none, until the server ends.

        Raises:
            InputError: as `serve_items.add_new_items`.
        """
        # Requests are answered meanwhile, with the items that there are.
        with self._adding:
            before = self._catalogue
            if self._encoder is None:
                self._encoder = NewItemEncoder(before.run)
            run = add_new_items(before.run, request.items, before.filters.columns, self._encoder)
            added = {**before.added, **{item.item_id: item.text for item in request.items}}
            catalogue = Catalogue(run, added, before)
            extended = extend_models(run, self._models)
            with self._busy:
                self._models, self._catalogue = extended.apply(), catalogue
        log.info("items added: %d; items in all: %d.", len(request.items), catalogue.num_items)
        return {"added": len(request.items), "items": catalogue.num_items}

    def close(self, seconds: float) -> bool:
        """Wait for the requests that use the models, and let no further one begin.

        Returns:
            Whether they are idle; False after that many seconds.
        """
        ends = time.monotonic() + seconds
        idle = self._recommending.close(seconds)
        return self._comparing.close(max(0.0, ends - time.monotonic())) and idle

    def _model_names(self, request: ListRequest) -> tuple[str, ...]:
        if request.model is None:
            return tuple(self._models)
        if request.model not in self._models:
            raise InputError(
                f"model: there is no '{one_line(request.model, 40)}'; the run has "
                f"{', '.join(self._models)}."
            )
        return (request.model,)

    def _asked_history(self, request: RecommendRequest) -> tuple[np.ndarray, np.ndarray | None]:
        """Return item numbers, int64 [n], and where the model reads times seconds, int64 [n + 1]."""
        if (request.user is None) == (request.history is None):
            raise InputError("the request must name either a user or a history, and not both.")
        if request.history is None and request.times is not None:
            raise InputError("times: a user's items have times of their own; leave times out.")
        if not self._reads_times and request.times is not None:
            raise InputError(
                "times: the run's model reads no times (use_timestamps: False); leave times out."
            )
        if request.predict_at is not None and self._run.config.predict_at != "target":
            raise InputError(
                f"predict_at: the run does not know for when it predicts (predict_at: "
                f"{self._run.config.predict_at}); leave it out."
            )
        if request.user is not None:
            numbers, seconds = self._history(request.user)
        else:
            numbers = self._run.item_numbers(request.history or ())
            seconds = self._given_times(request)
        if not self._reads_times:
            return numbers, None
        now = int(time.time())
        if request.predict_at is not None:
            now = self._read_time(request.predict_at, "predict_at")
        return numbers, np.append(seconds, now)

    def _given_times(self, request: RecommendRequest) -> np.ndarray:
        """Return the seconds of a request's history: int64 [n], or [0] where none are read."""
        if not self._reads_times:
            return np.empty(0, dtype=np.int64)
        count = len(request.history or ())
        if request.times is None or len(request.times) != count:
            given = "none" if request.times is None else len(request.times)
            raise InputError(
                f"times: the run's model reads the times of a history (use_timestamps), so {count} "
                f"are needed for its {count} items and there are {given}; add them."
            )
        seconds = [
            self._read_time(one, f"times.{place}") for place, one in enumerate(request.times)
        ]
        times = np.array(seconds, dtype=np.int64)
        if (np.diff(times) < 0).any():
            place = int(np.flatnonzero(np.diff(times) < 0)[0]) + 1
            raise InputError(
                f"times.{place} is earlier than the one before it; name the items oldest first."
            )
        return times

    def _read_time(self, given: int | str, name: str) -> int:
        return read_time(str(given), self._time_scale, f"{name}:", self._first_time)

    def _history(self, user_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a user's item numbers and their times in seconds: int32 and int64 [n].

        Raises:
            InputError: there is no such user.
        """
        data = self._run.data.interactions
        row = self._rows.get(user_id)
        if row is None:
            some = ", ".join(map(str, data.user_ids[:5]))
            raise InputError(
                f"{self._run.config.dataset} has no user '{one_line(user_id, 80)}'; its users are, "
                f"for example, {some}."
            )
        where = slice(data.offsets[row], data.offsets[row + 1])
        return data.items[where], data.timestamps[where] // self._time_scale

    def _excluded(self, request: ListRequest) -> np.ndarray:
        return self._run.item_numbers(request.exclude)

    def _allowed(self, request: ListRequest) -> np.ndarray | None:
        """Return the items that a filter lets through: int64 [k]; None: all."""
        if request.diversify > 0:
            self._require_vectors("diversify")
        allowed: np.ndarray | None = None
        for column, values in request.filter.items():
            numbers = self._catalogue.filters.items(column, values)
            allowed = numbers if allowed is None else np.intersect1d(allowed, numbers)
        return allowed

    def _require_vectors(self, what: str) -> None:
        if self._run.config.model in _WITHOUT_VECTORS:
            raise InputError(
                f"{what}: a run of {self._run.config.model} has no item vectors to compare; serve "
                f"another run."
            )

    def _rank_for_histories(
        self, asked: Sequence[tuple[tuple[str, ...], ListQuery]]
    ) -> list[dict[str, Ranked]]:
        config = self._run.config

        def rank(scorer: Scorer, queries: Sequence[ListQuery]) -> list[Ranked]:
            return rank_for_histories(
                scorer,
                queries,
                max_length=config.eval_list_length,
                device=self._run.fabric.device,
                batch_size=config.eval_batch_size,
                budget_bytes=config.logits_budget_mb << 20,
                of_next=config.predict_at == "target",
                raw_times=config.model in RAW_TIME_MODELS,
            )

        return self._by_model(asked, rank)

    def _rank_similar(
        self, asked: Sequence[tuple[tuple[str, ...], ListQuery]]
    ) -> list[dict[str, Ranked]]:
        def rank(scorer: Scorer, queries: Sequence[ListQuery]) -> list[Ranked]:
            return rank_similar(
                scorer,
                queries,
                device=self._run.fabric.device,
                budget_bytes=self._run.config.logits_budget_mb << 20,
            )

        return self._by_model(asked, rank)

    def _by_model(
        self,
        asked: Sequence[tuple[tuple[str, ...], ListQuery]],
        rank: Callable[[Scorer, Sequence[ListQuery]], list[Ranked]],
    ) -> list[dict[str, Ranked]]:
        """Return the lists of each request's models, computed model after model for all requests."""
        answers: list[dict[str, Ranked]] = [{} for _ in asked]
        with self._busy, self._run.fabric.autocast():
            for name, scorer in self._models.items():
                places = [place for place, (names, _) in enumerate(asked) if name in names]
                if places:
                    ranked = rank(scorer, [asked[place][1] for place in places])
                    for place, one in zip(places, ranked, strict=True):
                        answers[place][name] = one
        return answers

    def _answer(self, ranked: Mapping[str, Ranked], with_rank: bool) -> dict[str, Any]:
        # Read after the lists were made, so that it has every item of theirs.
        catalogue, models = self._catalogue, []
        for name, one in ranked.items():
            items = [
                {**catalogue.item(number), "score": score}
                for number, score in zip(one.items.tolist(), one.scores.tolist(), strict=True)
            ]
            model: dict[str, Any] = {"name": name, "items": items}
            if with_rank:
                place = {"rank": one.rank, "candidates": one.candidates}
                model["found"] = None if one.rank is None else place
            models.append(model)
        return {"models": models}
