"""Answers about one run: search, histories, recommendations; and their schema."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from hsft.data.interactions import PAD
from hsft.evaluator.evaluator import Scorer
from hsft.finished.open_run import OpenRun, items_read
from hsft.utils.errors import InputError

MOST_MATCHES = 20
MOST_RECOMMENDED = 100
LONGEST_QUERY = 200
LONGEST_HISTORY = 10_000


class Item(BaseModel):
    """An item; `new` where the run's data has no interaction with it."""

    item_id: str
    title: str
    new: bool = False


class ScoredItem(Item):
    """An item with its score, on the model's own scale."""

    score: float


class Rank(BaseModel):
    """An item's rank among the candidates."""

    rank: int
    candidates: int


class ModelItems(BaseModel):
    """What one model recommends, best first, and the rank of the item asked for."""

    name: str
    items: list[ScoredItem]
    found: Rank | None = None


class Recommended(BaseModel):
    """What every model recommends."""

    models: list[ModelItems]


class Items(BaseModel):
    """Items that match a query."""

    items: list[Item]


class User(BaseModel):
    """A user and how many items its history has."""

    user_id: str
    items: int


class Users(BaseModel):
    """Users that match a query."""

    users: list[User]


class History(BaseModel):
    """A user's items, oldest first."""

    user_id: str
    history: list[Item]


class Info(BaseModel):
    """What is served; `max_length` is null where no model reads the history."""

    run: str
    dataset: str
    models: list[str]
    items: int
    users: int
    max_length: int | None
    topk: int
    most: int


class RecommendRequest(BaseModel):
    """What is asked of `/recommend`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    history: Annotated[list[str], Field(min_length=1, max_length=LONGEST_HISTORY)] = Field(
        description="item ids, oldest first"
    )
    topk: Annotated[int, Field(ge=1, le=MOST_RECOMMENDED)] | None = Field(
        None, description="items a model; without it, what the server was started with"
    )
    exclude_seen: bool = Field(True, description="leave the history's items out")
    find: str | None = Field(None, description="id of an item whose rank is asked for")


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


class ServeApi:
    """Answers about one opened run. Its models are built here; one request uses them at a time.

    Args:
        run: the run.
        topk: recommendations when a request names no number.

    Raises:
        InputError: a model's or the data's files are missing or damaged, or `topk` is out of range.
    """

    def __init__(self, run: OpenRun, topk: int) -> None:
        if not 1 <= topk <= MOST_RECOMMENDED:
            raise InputError(
                f"--topk {topk} is out of range for the page; choose 1 to {MOST_RECOMMENDED}."
            )
        data = run.data.interactions
        self._run, self._topk = run, topk
        self._ids = [str(item) for item in data.item_ids]
        self._titles = [run.titles.get(item, "") for item in self._ids]
        # Shorter ids first, which orders numbers by value.
        self._users = sorted(map(str, data.user_ids), key=lambda user: (len(user), user))
        counts = np.bincount(data.items, minlength=len(self._ids))
        self._new = counts == 0
        # Item numbers, the most frequent first.
        self._by_frequency = 1 + np.argsort(-counts[1:], kind="stable")
        self._item_search = TextSearch(
            [self._ids[number] for number in self._by_frequency],
            [self._titles[number] for number in self._by_frequency],
        )
        self._user_search = TextSearch(self._users, [""] * len(self._users))
        self._lengths = dict(zip(map(str, data.user_ids), data.lengths.tolist(), strict=True))
        self._with_target = [user for user in self._users if self._lengths[user] >= 2]
        self._models: dict[str, Scorer] = {name: run.build(name) for name in run.models}
        self._busy = threading.Lock()

    def info(self) -> dict[str, Any]:
        """Return what the page says about the run."""
        config, data = self._run.config, self._run.data.interactions
        return {
            "run": self._run.folder.resolve().name,
            "dataset": config.dataset,
            "models": list(self._models),
            "items": data.num_items,
            "users": data.num_users,
            "max_length": items_read(config, config.MAX_ITEM_LIST_LENGTH) or None,
            "topk": self._topk,
            "most": MOST_RECOMMENDED,
        }

    def items(self, query: str) -> dict[str, Any]:
        """Return at most 20 items whose title and id contain the query's words.

        The item with that id comes first, then titles that begin with the query, then the others,
        each kind by the number of interactions. An empty query finds the most frequent items.
        """
        matches = self._item_search.search(query)
        return {"items": [self._item(int(self._by_frequency[entry])) for entry in matches]}

    def users(self, query: str) -> dict[str, Any]:
        """Return at most 20 user ids that contain the query, with the lengths of their histories."""
        matches = [self._users[entry] for entry in self._user_search.search(query)]
        return {"users": [{"user_id": user, "items": self._lengths[user]} for user in matches]}

    def user(self, user_id: str) -> dict[str, Any]:
        """Return all items of a user, oldest first.

        Raises:
            InputError: there is no such user.
        """
        history = self._run.history(user_id)
        return {"user_id": user_id, "history": [self._item(int(number)) for number in history]}

    def random_user(self) -> dict[str, Any]:
        """Return the items of a user drawn at random, of those with two items or more."""
        return self.user(random.choice(self._with_target or self._users))

    def recommend(self, request: RecommendRequest) -> dict[str, Any]:
        """Return every model's best items for a history.

        Args:
            request: history and options.

        Returns:
            `models`: a list of `name`, `items` (best first) and, when `find` is given, `found`:
            `rank` among `candidates` items, counted as evaluation does (items of the same score
            come before it), or None where the item is not a candidate.

        Raises:
            InputError: the request names an unknown item.
        """
        numbers = self._run.item_numbers(request.history)
        find = request.find
        target = None if find is None else int(self._run.item_numbers([find])[0])
        topk = request.topk or self._topk
        with self._busy:
            models = [
                self._best_items(name, numbers, topk, request.exclude_seen, target)
                for name in self._models
            ]
        return {"models": models}

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait for a request that uses the models, and let no further one begin.

        Returns:
            Whether they are idle; False after that many seconds.
        """
        return self._busy.acquire(timeout=seconds)

    def _best_items(
        self, name: str, history: np.ndarray, topk: int, exclude_seen: bool, target: int | None
    ) -> dict[str, Any]:
        asked = topk if target is None else len(self._ids) - 1
        best = self._run.recommend(self._models[name], [history], asked, exclude_seen)
        items, scores = best.items[0], best.scores[0]
        items, scores = items[items != PAD], scores[items != PAD]
        answer: dict[str, Any] = {
            "name": name,
            "items": [
                {**self._item(int(number)), "score": float(score)}
                for number, score in zip(items[:topk], scores[:topk], strict=True)
            ],
        }
        if target is not None:
            (position,) = np.nonzero(items == target)
            answer["found"] = (
                {"rank": int((scores >= scores[position[0]]).sum()), "candidates": len(items)}
                if len(position)
                else None
            )
        return answer

    def _item(self, number: int) -> dict[str, Any]:
        item: dict[str, Any] = {"item_id": self._ids[number], "title": self._titles[number]}
        return {**item, "new": True} if self._new[number] else item
