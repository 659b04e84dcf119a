"""MovieLens in its three formats: of 100K, of 1M and 10M, and of 20M and later.

Genres become the tag; a title keeps its year; there is no description.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from hsft.data.csv_rows import RowProblems, refuse_other_separator
from hsft.data.prepare.rows import Download, Event, Item, joined, plain_text
from hsft.data.prepare.sources import Source, wrong_width
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_folder, require_file

# The last 19 fields of u.item, 1 where the film is of the genre.
GENRES = (
    *("", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western"),
)
_FIELDS_100K = 5 + len(GENRES)
_NO_GENRE = "(no genres listed)"
_RATINGS_HEADER = ["userId", "movieId", "rating", "timestamp"]
_MOVIES_HEADER = ["movieId", "title", "genres"]


@dataclass(frozen=True)
class _Edition:
    ratings: str
    movies: str
    events: Callable[[Source, RowProblems], Iterator[Event]]
    described: Callable[[Source, RowProblems], Iterator[Item]]


def movielens(folder: Path) -> Download:
    """Describe an unpacked MovieLens folder, or the zip archive as downloaded.

    Raises:
        InputError: it is missing, or holds no ratings and films of a known format.
    """
    for edition in _EDITIONS:
        files = _find(folder, edition.ratings, edition.movies)
        if files is not None:
            return Download(
                name=folder.resolve().name.removesuffix(".zip"),
                interactions=files[0],
                items=files[1],
                events=edition.events,
                described=edition.described,
            )
    pairs = ", ".join(f"{edition.ratings} with {edition.movies}" for edition in _EDITIONS)
    raise InputError(
        f"{folder} holds none of {pairs}; name the unpacked folder or the zip archive."
    )


def _find(folder: Path, *names: str) -> tuple[Source, ...] | None:
    """Return these files of a folder or archive, which have one parent, or None."""
    if is_folder(folder):
        if all((folder / name).is_file() for name in names):
            return tuple(Source(folder / name) for name in names)
        return None
    require_file(folder, str(folder), "name the unpacked folder or the zip archive")
    try:
        with zipfile.ZipFile(folder) as archive:
            members = set(archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"{folder} is no readable zip archive; name the unpacked folder, or download it again."
        ) from error
    for member in sorted(members):
        pair = [str(PurePosixPath(member).with_name(name)) for name in names]
        if PurePosixPath(member).name == names[0] and members.issuperset(pair):
            return tuple(Source(folder, name) for name in pair)
    return None


def _split_events(source: Source, problems: RowProblems, separator: str) -> Iterator[Event]:
    for row, cells in source.split_rows("reading interactions", separator):
        if len(cells) == 4:
            yield Event(row, cells[1], cells[0], cells[3], cells[2])
        else:
            wrong_width(problems, row, len(cells), 4)


def _csv_events(source: Source, problems: RowProblems) -> Iterator[Event]:
    for row, (user, movie, rating, time) in _with_header(
        source, problems, _RATINGS_HEADER, "reading interactions"
    ):
        yield Event(row, movie, user, time, rating)


def _csv_items(source: Source, problems: RowProblems) -> Iterator[Item]:
    for row, (movie, title, genres) in _with_header(
        source, problems, _MOVIES_HEADER, "reading items"
    ):
        yield Item(row, movie, plain_text(title), _genres(genres), "")


def _with_header(
    source: Source, problems: RowProblems, header: list[str], task: str
) -> Iterator[tuple[int, list[str]]]:
    line = source.first_line()
    rows = source.csv_rows(task)
    _, first = next(rows)
    if first != header:
        refuse_other_separator(source.shown, line, header[0].lower())
        raise InputError(
            f"{source.shown} must begin with the line {','.join(header)}, its first line is "
            f"'{one_line(','.join(first), 120)}'; check that it is MovieLens' file."
        )
    for row, cells in rows:
        if len(cells) == len(header):
            yield row, cells
        else:
            wrong_width(problems, row, len(cells), len(header))


def _dat_items(source: Source, problems: RowProblems) -> Iterator[Item]:
    for row, line in _old_text(source):
        cells = line.split("::")
        if len(cells) == 3:
            yield Item(row, cells[0], plain_text(cells[1]), _genres(cells[2]), "")
        else:
            wrong_width(problems, row, len(cells), 3)


def _items_100k(source: Source, problems: RowProblems) -> Iterator[Item]:
    for row, line in _old_text(source):
        cells = line.split("|")
        if len(cells) == _FIELDS_100K:
            flags = zip(GENRES, cells[5:], strict=True)
            genres = joined([genre for genre, flag in flags if flag == "1"], ", ")
            yield Item(row, cells[0], plain_text(cells[1]), genres, "")
        else:
            wrong_width(problems, row, len(cells), _FIELDS_100K)


def _old_text(source: Source) -> Iterator[tuple[int, str]]:
    """Yield a small file's lines: 10M is in UTF-8, 100K and 1M are in Latin-1."""
    lines = list(source.raw_lines("reading items"))
    try:
        texts = [line.decode("utf-8") for _, line in lines]
    except UnicodeDecodeError:
        texts = [line.decode("latin-1") for _, line in lines]
    for (row, _), text in zip(lines, texts, strict=True):
        if text := text.rstrip("\r\n"):
            yield row, text


def _genres(text: str) -> str:
    names = [plain_text(name) for name in text.split("|")]
    return joined([name for name in names if name != _NO_GENRE], ", ")


_EDITIONS = (
    _Edition("u.data", "u.item", partial(_split_events, separator="\t"), _items_100k),
    _Edition("ratings.dat", "movies.dat", partial(_split_events, separator="::"), _dat_items),
    _Edition("ratings.csv", "movies.csv", _csv_events, _csv_items),
)
