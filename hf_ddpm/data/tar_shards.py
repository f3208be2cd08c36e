"""The labels in WebDataset shards: tar files whose consecutive files of one key are an example.

key      the path of a file up to the first dot of its name
field    the rest of its name: in 0001.jpg, 0001.cls and 0001.json these are jpg, cls and json
column   a field, as `cls`; or a key of the object in a JSON file, as `json.mass`
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_ddpm.runtime.errors import UsageError, in_one_line

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


def read_columns(files: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """Read columns of labels from shards on this machine; of the images only the headers are read.

    Args:
        files: The shards.
        names: The columns, which hold whole numbers, or what JSON holds, or texts.

    Returns:
        The number of examples of each shard, (num_shards,) int64; and the cells of each column, None where an example
        has none.

    Raises:
        UsageError: When a shard cannot be read.
    """
    counts, cells = [], {name: [] for name in names}
    for file in files:
        try:
            examples = _examples_in(file, {name.partition(".")[0] for name in names})
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UsageError(
                f"dataset_name must hold whole tar files, got {file!r}: {in_one_line(error, with_type=True)}; "
                "replace it"
            ) from error
        counts.append(len(examples))
        for name, column in cells.items():
            column += [_cell(example, name) for example in examples]
    return np.array(counts, np.int64), cells


def _examples_in(file: str, fields: set[str]) -> list[dict[str, Any]]:
    """Return the wanted fields of each example of a shard."""
    examples: list[dict[str, Any]] = []
    last_key = None
    with tarfile.open(file) as shard:
        for member in shard:
            match = _NAME.fullmatch(member.name)
            # Hidden files are none, and neither are those that macOS adds.
            if not member.isreg() or match is None or Path(member.name).name.startswith("__"):
                continue
            key, field = match.groups()
            if key != last_key:
                examples.append({})
                last_key = key
            if field in fields:
                opened = shard.extractfile(member)
                assert opened is not None
                examples[-1][field] = _value(field, opened.read())
            shard.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps all, and they are many
    return examples


def _value(field: str, content: bytes) -> Any:
    if field == "json":
        return json.loads(content)
    text = content.decode().strip()
    return int(text) if field in ("cls", "cls2", "index", "inx", "id") else text


def _cell(example: dict[str, Any], name: str) -> Any:
    field, _, key = name.partition(".")
    value = example.get(field)
    return value if not key or value is None else value.get(key)


def label_table(cells: dict[str, list[Any]]) -> Any:
    """Return columns of labels as a table of `datasets`.

    Raises:
        UsageError: When a column holds values of several types.
    """
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_dict(cells)
    except pyarrow.ArrowException as error:
        raise UsageError(
            f"label_column must hold values of one type: {in_one_line(error)}; make them alike"
        ) from error
