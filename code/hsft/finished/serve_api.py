"""What the page of `serve` asks for, as plain values: search, histories, recommendations."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from hsft.data.interactions import PAD
from hsft.evaluator.evaluator import Scorer
from hsft.finished.open_run import OpenRun, items_read
from hsft.utils.errors import InputError, one_line

MOST_FOUND = 20
MOST_RECOMMENDED = 100
LONGEST_QUERY = 200
_KEYS = ("history", "topk", "exclude_seen", "find")


class Catalogue:
    """Texts that can be searched, in the order in which equally good ones are to be found.

    Args:
        ids: one each.
        titles: one each, or empty.
    """

    def __init__(self, ids: Sequence[str], titles: Sequence[str]) -> None:
        self._exact = {text.casefold(): place for place, text in reversed(list(enumerate(ids)))}
        # Each title and id follows a line break, so that one look says whether either begins with
        # a query.
        self._texts = [
            f"\n{title}\n{text}".casefold() for text, title in zip(ids, titles, strict=True)
        ]

    def search(self, query: str, most: int = MOST_FOUND) -> list[int]:
        """Return the places of entries that contain every word of the query, in any case.

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
        found: Sequence[int] = range(len(self._texts))
        for word in words:
            found = [place for place in found if word in self._texts[place]]
        exact = [self._exact[query]] if query in self._exact else []
        begin = (place for place in found if f"\n{query}" in self._texts[place])
        ranked = [*exact, *islice(begin, most), *found[:most]]
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
        # Shorter ids first, so that numbers stand in their order.
        self._users = sorted(map(str, data.user_ids), key=lambda user: (len(user), user))
        counts = np.bincount(data.items, minlength=len(self._ids))
        self._new = counts == 0
        # Item numbers, the most frequent first.
        self._order = 1 + np.argsort(-counts[1:], kind="stable")
        self._items_found = Catalogue(
            [self._ids[number] for number in self._order],
            [self._titles[number] for number in self._order],
        )
        self._users_found = Catalogue(self._users, [""] * len(self._users))
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
        found = self._items_found.search(query)
        return {"items": [self._item(int(self._order[place])) for place in found]}

    def users(self, query: str) -> dict[str, Any]:
        """Return at most 20 user ids that contain the query, with the lengths of their histories."""
        found = [self._users[place] for place in self._users_found.search(query)]
        return {"users": [{"user_id": user, "items": self._lengths[user]} for user in found]}

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

    def recommend(self, request: Any) -> dict[str, Any]:
        """Return every model's best items for a history.

        Args:
            request: a mapping with `history` (item ids, oldest first) and, if wanted, `topk`,
                `exclude_seen` (leave the history's items out; default True) and `find`, the id of
                an item whose rank is asked for.

        Returns:
            `models`: a list of `name`, `items` (best first) and, when `find` is given, `found`:
            `rank` among `candidates` items, counted as evaluation does (items of the same score
            come before it), or None where the item is not a candidate.

        Raises:
            InputError: the request is not of that form, or names an unknown item.
        """
        history, topk, exclude_seen, find = self._read(request)
        numbers = self._run.item_numbers(history)
        target = None if find is None else int(self._run.item_numbers([find])[0])
        with self._busy:
            models = [self._ask(name, numbers, topk, exclude_seen, target) for name in self._models]
        return {"models": models}

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait for a request that uses the models, and let no further one begin.

        Returns:
            Whether they are idle; False after that many seconds.
        """
        return self._busy.acquire(timeout=seconds)

    def _ask(
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
            place = np.flatnonzero(items == target)
            answer["found"] = (
                {"rank": int((scores >= scores[place[0]]).sum()), "candidates": len(items)}
                if len(place)
                else None
            )
        return answer

    def _item(self, number: int) -> dict[str, Any]:
        item: dict[str, Any] = {"item_id": self._ids[number], "title": self._titles[number]}
        return {**item, "new": True} if self._new[number] else item

    def _read(self, request: Any) -> tuple[list[str], int, bool, str | None]:
        if not isinstance(request, Mapping):
            raise InputError("the request is no JSON object; send one with the key history.")
        unknown = [key for key in request if key not in _KEYS]
        if unknown:
            raise InputError(
                f"the request has an unknown key '{one_line(unknown[0], 40)}'; "
                f"it takes {', '.join(_KEYS)}."
            )
        history = request.get("history")
        if not isinstance(history, list) or not all(isinstance(item, str) for item in history):
            raise InputError("history is no list of item ids as text; send for example ['1', '2'].")
        if not history:
            raise InputError("history is empty; give at least one item.")
        topk = request.get("topk", self._topk)
        # True is an int, too.
        if type(topk) is not int or not 1 <= topk <= MOST_RECOMMENDED:
            raise InputError(f"topk is no whole number from 1 to {MOST_RECOMMENDED}; change it.")
        exclude_seen = request.get("exclude_seen", True)
        if not isinstance(exclude_seen, bool):
            raise InputError("exclude_seen is neither true nor false; change it.")
        find = request.get("find")
        if not (find is None or isinstance(find, str)):
            raise InputError("find is no item id as text; change it or leave it out.")
        return history, topk, exclude_seen, find
