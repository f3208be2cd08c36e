"""Files that the rows of metadata pair: images, and what they are made from, one of which or both are arrays.

row    names a file of the column of images and one of `condition_column`, which hold as many images; each of these
       becomes a row of the table, with the other cells of its row. A picture is one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ddpm.data.arrays import one_image, slice_feature, slices_of
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import folder_classes, metadata_column
from hf_ddpm.data.metadata import Metadata
from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def open_array_pairs(metadata: Metadata, of_arrays: Mapping[str, bool], config: DataConfig) -> Dataset:
    """Open the files that metadata name, as `open_array_files` does, beside the other columns of the metadata.

    Args:
        metadata: The rows.
        of_arrays: The columns of files that are read, first that of the images, and whether their files are arrays.
        config: The settings of the data.

    Raises:
        UsageError: When a file cannot be opened, or the files of a row hold different numbers of images.
    """
    import datasets
    import pyarrow

    images, *_ = of_arrays
    numbers: list[int] = []
    encoded: dict[str, list[Any]] = {name: [] for name in of_arrays}
    # If the first file of a column is one image, all are: one that is not will be named when it is read.
    hold_one: dict[str, bool] = {}
    for row in range(len(metadata)):
        of_row: dict[str, list[Any]] = {}
        for name, is_of_arrays in of_arrays.items():
            path = metadata.columns[name][row]
            if is_of_arrays:
                of_row[name] = _slices(path, config, hold_one.get(name, False))
                hold_one.setdefault(name, path is not None and of_row[name] == [one_image(Path(path))])
            else:
                of_row[name] = [None if path is None else {"bytes": None, "path": path}]
        counts = {name: len(cells) for name, cells in of_row.items()}
        if len({*counts.values()}) > 1:
            held = " and ".join(f"{count:,} in {name!r}" for name, count in counts.items())
            raise UsageError(
                f"the files of a row must hold as many images, got {held} in row {row} of the metadata: save them "
                "alike, or see --stack_axis"
            )
        numbers += [row] * len(of_row[images])
        for name, cells in of_row.items():
            encoded[name] += cells
    other_columns = {name: cells for name, cells in metadata.columns.items() if name not in metadata.file_columns}
    columns: dict[str, Any] = {
        name: metadata_column(name, [cells[row] for row in numbers], is_of_files=False)
        for name, cells in other_columns.items()
    }
    features: dict[str, Any] = {**datasets.Features.from_arrow_schema(pyarrow.table(columns).schema)}
    labels = folder_classes([Path(cell["path"] if cell else "") for cell in encoded[images]])
    if labels is not None and "label" not in columns:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=sorted({*labels}))
    # One object for all columns of a kind: `datasets` hashes a table by what its features share, too.
    of_array, of_picture = slice_feature(), datasets.Image()
    features.update({name: of_array if is_array else of_picture for name, is_array in of_arrays.items()})
    return datasets.Dataset.from_dict({**columns, **encoded}, features=datasets.Features(features))


def _slices(path: str | None, config: DataConfig, holds_one: bool) -> list[Any]:
    """Return the encoded images of the file that a cell names; those of an empty cell are none, and named later.

    Args:
        path: The cell.
        config: The settings of the data.
        holds_one: Whether the file is known to be one image, so that it need not be opened.
    """
    if path is None:
        return [None]
    return [one_image(Path(path))] if holds_one else slices_of(Path(path), config)
