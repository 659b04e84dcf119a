"""What requests to a served run hold, and what it answers: the schema of its API."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_RECOMMENDED = 100
LONGEST_HISTORY = 10_000
MOST_EXCLUDED = 10_000
MOST_FILTERS = 100
LONGEST_ID = 1000
MOST_ADDED = 100
LONGEST_VECTOR = 65_536

Id = Annotated[str, Field(max_length=LONGEST_ID)]


def _check_time(value: object) -> object:
    # One sentence for both types, where pydantic has one for each.
    number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18
    if not number and not (isinstance(value, str) and len(value) <= 40):
        raise ValueError("a time is a date in ISO 8601 or a number as in the data's timestamps")
    return value


Time = Annotated[int | str, BeforeValidator(_check_time)]


class Problem(BaseModel):
    """Why a request was refused, in one sentence."""

    error: str


class Health(BaseModel):
    """The server answers."""

    status: str


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


class HistoryItem(Item):
    """An item of a history; `time` where the run's model reads times."""

    time: str | None = None


class History(BaseModel):
    """A user's items, oldest first."""

    user_id: str
    history: list[HistoryItem]


class Info(BaseModel):
    """What is served; `max_length` is null where no model reads the history.

    `reads_times`: a history needs times. `predicts_at`: the model reads `predict_at` too. `filter`
    may name the columns in `filters`.
    """

    run: str
    dataset: str
    models: list[str]
    items: int
    users: int
    max_length: int | None
    topk: int
    most: int
    reads_times: bool
    predicts_at: bool
    filters: list[str]


class ListRequest(BaseModel):
    """What `/recommend` and `/similar` have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    topk: Annotated[int, Field(ge=1, le=MOST_RECOMMENDED)] | None = Field(
        None, description="items a model; without it, what the server was started with"
    )
    exclude: Annotated[list[Id], Field(max_length=MOST_EXCLUDED)] = Field(
        [], description="ids of items to leave out"
    )
    filter: Annotated[
        dict[
            Annotated[str, Field(max_length=LONGEST_ID)],
            Annotated[
                list[Annotated[str, Field(max_length=LONGEST_ID)]],
                Field(min_length=1, max_length=MOST_FILTERS),
            ],
        ],
        Field(max_length=10),
    ] = Field(
        {},
        description="column of the item information to values: only items that have one of the "
        "values, in each column, whole or as a part between commas, bars or semicolons",
    )
    diversify: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        strict=False,
        description="weight of being unlike the items before it in the list, against the score, by "
        "maximal marginal relevance over the models' item vectors; 0: by score alone",
    )
    model: str | None = Field(None, description="one of the run's models; without it, all of them")


class RecommendRequest(ListRequest):
    """What is asked of `/recommend`: a user, or a history."""

    user: Id | None = Field(None, description="a user of the data, with all of its items")
    history: Annotated[list[Id], Field(min_length=1, max_length=LONGEST_HISTORY)] | None = Field(
        None, description="item ids, oldest first"
    )
    times: Annotated[list[Time], Field(max_length=LONGEST_HISTORY)] | None = Field(
        None,
        description="when the history's items were met, one each, where the run's model reads times: "
        "dates in ISO 8601 (UTC without a zone) or numbers as in the data's timestamps",
    )
    predict_at: Time | None = Field(
        None,
        description="when the recommendations are for, with a run of predict_at: target; without "
        "it, now",
    )
    exclude_seen: bool = Field(True, description="leave the history's items out")
    find: Id | None = Field(None, description="id of an item whose rank is asked for")


class SimilarRequest(ListRequest):
    """What is asked of `/similar`."""

    item: Id = Field(description="id of the item that others are compared with")


class NewItem(BaseModel):
    """An item to add: texts that are encoded, or a vector as the run's item cache has them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    item_id: Id
    text: Annotated[dict[str, str], Field(max_length=100)] = Field(
        {}, description="column of the item information to the item's text"
    )
    embedding: (
        Annotated[
            list[Annotated[float, Field(strict=False, allow_inf_nan=False)]],
            Field(min_length=1, max_length=LONGEST_VECTOR),
        ]
        | None
    ) = Field(
        None,
        description="vector by the ItemLLM of the run's item cache; without it, text is encoded",
    )


class AddRequest(BaseModel):
    """What is asked of `POST /items`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MOST_ADDED)] = Field(
        description="item_id, and text by column or an embedding, of each item"
    )


class Added(BaseModel):
    """How many items were added, and how many there are."""

    added: int
    items: int
