"""Downloaded files read as streams of lines: plain, gzip, or a member of a zip archive."""

from __future__ import annotations

import csv
import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hsft.data.csv_rows import MAX_FIELD, RowProblems
from hsft.utils.errors import InputError, brief
from hsft.utils.files import require_file
from hsft.utils.progress import Meter

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_LINES_BETWEEN_UPDATES = 4096
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, NotImplementedError)


@dataclass(frozen=True)
class Source:
    """A file that somebody downloaded.

    Attributes:
        path: the file; gzip is recognised by its first bytes, whatever its name.
        member: for a zip archive, the name of the file in it.
    """

    path: Path
    member: str | None = None

    @property
    def shown(self) -> Path:
        """What to call it in messages."""
        return self.path / self.member if self.member else self.path

    def raw_lines(self, task: str = "") -> Iterator[tuple[int, bytes]]:
        """Yield the number and bytes of every line, its end included; memory holds one line.

        Args:
            task: what progress is shown under; nothing is shown for an empty one.

        Raises:
            InputError: the file is missing, damaged, or no text.
        """
        require_file(self.path, str(self.path), "check the path")
        try:
            with ExitStack() as stack:
                stream, position, size = self._open(stack)
                megabytes = max(1, size // 10**6)
                bar = stack.enter_context(Meter(task, megabytes, "MB", enabled=bool(task)))
                for number, line in enumerate(_lines(stream), start=1):
                    if number == 1:
                        line = line.removeprefix(_BOM)
                    if number % _LINES_BETWEEN_UPDATES == 0:
                        bar.advance(position.tell() // 10**6 - bar.done)
                    if b"\0" in line:
                        raise InputError(
                            f"{self.shown}, row {number}: holds a NUL byte, so it is no UTF-8 text "
                            f"or damaged; download it again."
                        )
                    if len(line) > MAX_FIELD:
                        raise InputError(
                            f"{self.shown}, row {number}: is longer than {MAX_FIELD >> 20} MiB, so "
                            f"it is another kind of file or damaged; check it."
                        )
                    yield number, line
        except _BROKEN as error:
            raise InputError(
                f"{self.shown} is damaged or incomplete ({brief(error)}); download it again."
            ) from error
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{self.shown} cannot be read: {brief(error)}.") from error

    def text_lines(self, task: str = "", encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """Yield the number and text of every line, its end included.

        Raises:
            InputError: as `raw_lines`, or a line is not in the encoding.
        """
        for number, line in self.raw_lines(task):
            try:
                yield number, line.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{self.shown}, row {number}: is not {encoding.upper()} text; "
                    f"download it again or save it as {encoding.upper()}."
                ) from error

    def csv_rows(self, task: str = "", delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of every row with the line that it begins on; blank lines are left out.

        Raises:
            InputError: as `text_lines`, or a quote is not closed.
        """
        begin = 1
        reader = csv.reader(
            (line for _, line in self.text_lines(task)), strict=True, delimiter=delimiter
        )
        try:
            for cells in reader:
                if cells:
                    yield begin, cells
                begin = reader.line_num + 1
        except csv.Error as error:
            raise InputError(
                f"{self.shown}, row {begin}: not well-formed CSV ({error}); look for a quote that "
                f"is not closed or not doubled."
            ) from error

    def split_rows(self, task: str, separator: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of every line of a table without quotes; blank lines are left out.

        Raises:
            InputError: as `text_lines`.
        """
        for number, line in self.text_lines(task):
            line = line.rstrip("\r\n")
            if line:
                yield number, line.split(separator)

    def first_line(self) -> str:
        """Return the first line that is not blank, without its end.

        Raises:
            InputError: as `text_lines`, or there is no such line.
        """
        for _, line in self.text_lines():
            if text := line.rstrip("\r\n"):
                return text
        raise InputError(f"{self.shown} is empty; check that it is the right file.")

    def _open(self, stack: ExitStack) -> tuple[BinaryIO, BinaryIO, int]:
        """Return the stream to read, the one whose position tells progress, and the latter's size."""
        if self.member is not None:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            size = archive.getinfo(self.member).file_size
            member = cast(BinaryIO, stack.enter_context(archive.open(self.member)))
            return member, member, size
        file = stack.enter_context(self.path.open("rb"))
        packed = file.read(2) == _GZIP
        file.seek(0)
        size = self.path.stat().st_size
        if packed:
            return cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file))), file, size
        return file, file, size


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    # Not the stream's own iteration, which would take a file without line ends into memory whole.
    while line := stream.readline(MAX_FIELD + 1):
        yield line


def wrong_width(problems: RowProblems, row: int, cells: int, expected: int) -> None:
    """Book a row with another number of fields than its file's rows have."""
    if cells == 1:
        kind, remedy = "one", "check the separator, or complete the row"
    elif cells < expected:
        kind, remedy = "fewer", "complete the row or remove it"
    else:
        kind, remedy = "more", "look for a separator inside a field, or remove the row"
    problems.add(
        kind,
        row,
        f"has {cells} field{'s' * (cells != 1)} where {expected} are expected; {remedy}",
    )
