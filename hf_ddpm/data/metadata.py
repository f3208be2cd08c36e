"""The metadata of a folder of images: files whose rows name images, and say something about each.

metadata file     a file of METADATA_NAMES: CSV, JSON Lines or parquet. A folder may hold several, in its sub-folders
column of files   `file_name`, which becomes the column `image`, or `NAME_file_name`, which becomes `NAME`. Its cells
                  are paths as seen from the folder of the metadata file
empty cell        of CSV: nothing; beside numbers also what tables write for no number, see NO_NUMBERS
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_ddpm.data.config import DataConfig, remedy_of_skipping
from hf_ddpm.runtime.errors import UsageError, in_one_line

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# A text with a zero in front is the name of something: 007 is not 7.
_WHOLE_NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf(inity)?)", re.IGNORECASE)
NO_NUMBERS = {"nan", "na", "n/a", "#n/a", "<na>", "null", "none"}


@dataclass(frozen=True)
class Metadata:
    """The rows of the metadata files of a folder.

    Args:
        columns: Each column by its name, in which an empty cell is None; a column of files holds absolute paths.
        file_columns: The names of the columns of files, `image` first if it is one.
    """

    columns: dict[str, list[Any]]
    file_columns: list[str]

    def __len__(self) -> int:
        return len(self.columns[self.file_columns[0]])

    @cached_property
    def named(self) -> frozenset[str]:
        """The paths that rows name, in all columns of files."""
        return frozenset(path for name in self.file_columns for path in self.columns[name] if path is not None)


def column_of_files(metadata: Metadata, config: DataConfig) -> str | None:
    """Return the name of the column of files that holds the images; None without one."""
    names = metadata.file_columns
    if config.image_column is not None:
        return config.image_column if config.image_column in names else None
    return next((name for name in names if name != config.condition_column), None)


def read_metadata(folder: Path, files: Sequence[Path], images: Sequence[Path]) -> Metadata | None:
    """Read the rows that name images in a folder, in the order of the metadata files and of their rows.

    Args:
        folder: The folder.
        files: Its metadata files; those beside it count for the rows that name files in it.
        images: The images in it.

    Returns:
        The metadata; None without any, and if all files lie beside the folder and no row of them names a file in it.

    Raises:
        UsageError: When a file cannot be read, or a row names no file in the folder of its metadata file.
    """
    if not files:
        return None
    if len({file.suffix for file in files}) > 1:
        names = " and ".join(sorted({file.name for file in files}))
        raise UsageError(f"metadata must be of one kind, got {names} in {str(folder)!r}: keep one of them")
    tables = [(file, *_READERS[file.suffix](file)) for file in sorted(files, key=lambda file: file.as_posix())]
    names = [*dict.fromkeys(name for _, columns, _ in tables for name in columns)]
    of_files = sorted(filter(_is_of_files, names), key=lambda name: name != "file_name")
    column_of_file = {_image_column(name): name for name in of_files}
    resolve = _Resolver(folder.absolute(), images)
    merged: dict[str, list[Any]] = {name: [] for name in names}
    for file, columns, lines in tables:
        _require_file_columns(file, columns)
        base = f"{file.parent.absolute()}{os.sep}"
        is_beside = not base.startswith(resolve.start)
        for row, line in enumerate(lines):
            cells = {name: columns[name][row] if name in columns else None for name in names}
            for name in column_of_file.values():
                if name in columns:
                    cells[name] = resolve.path(file, base, line, name, cells[name])
            if is_beside and not str(cells[of_files[0]]).startswith(resolve.start):
                continue
            for name, cell in cells.items():
                merged[name].append(cell)
    if not merged[of_files[0]] and not any(file.is_relative_to(folder) for file in files):
        return None
    of_file = {name: column for column, name in column_of_file.items()}
    if taken := sorted({*column_of_file} & {*names} - {*of_file}):
        raise UsageError(
            f"metadata must have one column {taken[0]!r}, got it beside {column_of_file[taken[0]]!r}, which becomes "
            "it: rename one"
        )
    kind = files[0].suffix
    typed = {name: cells if name in of_file or kind != ".csv" else _typed(cells) for name, cells in merged.items()}
    return Metadata({of_file.get(name, name): cells for name, cells in typed.items()}, [*column_of_file])


class _Resolver:
    """A finder of the files that rows name.

    Args:
        folder: The absolute path of the folder of images.
        images: The images in it.
    """

    def __init__(self, folder: Path, images: Sequence[Path]):
        self.folder, self.start = folder, f"{folder}{os.sep}"
        self.images = {str(path.absolute()) for path in images}

    def path(self, file: Path, base: str, line: int, column: str, cell: Any) -> str | None:
        """Return the path that a cell names, whether or not there is a file; None for an empty cell.

        Args:
            file: The metadata file.
            base: The absolute path of its folder. If that is no folder in the folder of images, rows name other files
                in it, too.
            line: The number of the line or row in the file, for messages.
            column: The name of the column of files.
            cell: The cell.
        """
        if cell is None or cell == "":
            if column == "file_name":
                raise UsageError(
                    f"{column} must name an image in each row, got an empty cell in row {line} of {str(file)!r}: fill "
                    "it, or leave the row out"
                )
            return None
        if not isinstance(cell, str):
            raise UsageError(
                f"{column} must hold paths, got {cell!r} in row {line} of {str(file)!r}: write them as texts"
            )
        path = os.path.normpath(os.path.join(base, cell))
        if path not in self.images:
            path = self._other_spelling(path, os.path.normpath(os.path.join(base, cell.replace("\\", "/"))))
        if path.startswith(self.start if base.startswith(self.start) else (self.start, base)):
            return path
        raise UsageError(
            f"{column} must name a file in the folder of images, {str(self.folder)!r}, got {cell!r} in row {line} of "
            f"{str(file)!r}: write paths as seen from the metadata file, and keep the images below it"
        )

    def _other_spelling(self, path: str, without_backslashes: str) -> str:
        """Return the path of the image whose name has other code points, or that Windows would write otherwise."""
        for spelled in (path, without_backslashes):
            known = self._by_composed_name.get(unicodedata.normalize("NFC", spelled))
            if known is not None:
                return known
        return path

    @cached_property
    def _by_composed_name(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", path): path for path in self.images}


def require_files(metadata: Metadata, folder: Path, images: Sequence[Path], config: DataConfig) -> None:
    """Check that there is a file for each path that rows name.

    Args:
        metadata: The rows.
        folder: The folder of images.
        images: The images in it.
        config: The settings of the data, for the remedy.

    Raises:
        UsageError: When there is none for some.
    """
    known = {str(image.absolute()) for image in images}
    missing = sorted(path for path in metadata.named - known if not os.path.exists(path))
    if not missing:
        return
    stem = Path(missing[0]).stem.casefold()
    unnamed = (image for image in images if str(image.absolute()) not in metadata.named)
    similar = next((image for image in unnamed if image.stem.casefold() == stem), None)
    hint = "" if similar is None else f", where there is {similar.relative_to(folder).as_posix()!r}"
    raise UsageError(
        f"metadata must name files that exist, got {len(missing):,} that do not, as {missing[0]!r}{hint}: correct the "
        f"rows{remedy_of_skipping(config)}"
    )


def _is_of_files(name: str) -> bool:
    return name == "file_name" or name.endswith("_file_name")


def _image_column(name: str) -> str:
    return name.removesuffix("file_name").removesuffix("_") or "image"


def _require_file_columns(file: Path, columns: dict[str, list[Any]]) -> None:
    if not any(map(_is_of_files, columns)):
        remedy = "name the column of paths so"
        if file.suffix == ".csv" and len(columns) == 1 and re.search("[;\t]", next(iter(columns))):
            remedy = "separate the columns by commas"
        raise UsageError(
            f"metadata must have a column `file_name` or `NAME_file_name`, got {[*columns]} in {str(file)!r}: {remedy}"
        )


Table = tuple[dict[str, list[Any]], list[int]]  # columns, and the number of each row for messages


def _read_csv(file: Path) -> Table:
    """Read a file of CSV: texts, without spaces around them, or None for an empty cell."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(file, error, "save it as CSV in UTF-8, with commas") from error
    if not rows:
        raise UsageError(f"metadata must have a header, got an empty {str(file)!r}: fill it, or remove it")
    (_, header), *rows = rows
    if len({*header}) < len(header):
        raise UsageError(f"metadata must name each column once, got {header} in {str(file)!r}: rename one")
    for line, row in rows:
        if len(row) != len(header):
            raise UsageError(
                f"metadata must have {len(header)} cells in each row, as in the header, got {len(row)} in line {line} "
                f"of {str(file)!r}: put a cell that holds a comma in quotes"
            )
    columns = {name: [row[i] or None for _, row in rows] for i, name in enumerate(header)}
    return columns, [line for line, _ in rows]


def _read_jsonl(file: Path) -> Table:
    rows, lines = [], []
    try:
        with open(file, encoding="utf-8-sig") as opened:
            for line, text in enumerate(opened, 1):
                if text.strip():
                    rows.append(_json_object(file, line, text))
                    lines.append(line)
    except UnicodeDecodeError as error:
        raise _unreadable(file, error, "save it in UTF-8") from error
    if not rows:
        raise UsageError(f"metadata must have rows, got an empty {str(file)!r}: fill it, or remove it")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


def _json_object(file: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise _unreadable(file, error, f"write one JSON object in each line; see line {line}") from error
    if not isinstance(row, dict):
        got = f"{text.strip()[:60]!r} in line {line} of {str(file)!r}"
        raise UsageError(f"metadata must hold a JSON object in each line, got {got}: write {{...}} there")
    return row


def _read_parquet(file: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(file, error, "save it again") from error
    return {name: table[name].to_pylist() for name in table.column_names}, [*range(len(table))]


_READERS: dict[str, Callable[[Path], Table]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _unreadable(file: Path, error: Exception, remedy: str) -> UsageError:
    return UsageError(f"metadata must be readable, got {str(file)!r}: {in_one_line(error, with_type=True)}; {remedy}")


def _typed(cells: list[str | None]) -> list[Any]:
    """Return texts of CSV as what all of them are: whole numbers, numbers, true and false, or texts."""
    texts = {cell for cell in cells if cell is not None}
    numbers = {text for text in texts if _NUMBER.fullmatch(text)}
    if numbers and all(text.lower() in NO_NUMBERS for text in texts - numbers):
        is_name = any(re.match(r"[+-]?0\d", text) for text in numbers)
        if not is_name:
            make = int if all(_WHOLE_NUMBER.fullmatch(text) for text in numbers) else float
            return [make(cell) if cell in numbers else None for cell in cells]
    if texts and {text.lower() for text in texts} <= {"true", "false"}:
        return [None if cell is None else cell.lower() == "true" for cell in cells]
    return [*cells]
