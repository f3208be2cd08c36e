"""Files of arrays that the rows of metadata name: images, and the arrays that they are made from.

row    names a file of the column of images and one of `condition_column`, which hold as many images; each of these
       becomes a row of the table, with the other cells of its row
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ddpm.data.arrays import one_image, slice_feature, slices_of
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import folder_classes, metadata_column
from hf_ddpm.data.metadata import Metadata
from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def open_array_pairs(metadata: Metadata, config: DataConfig) -> Dataset:
    """Open the files that metadata name, as `open_array_files` does, beside the other columns of the metadata.

    Raises:
        UsageError: When there is no such column, a file cannot be opened, or the files of a row hold different numbers
            of images.
    """
    import datasets
    import pyarrow

    file_columns = _columns_of_files(metadata, config)
    numbers: list[int] = []
    slices: dict[str, list[Any]] = {name: [] for name in file_columns}
    # If the first file of a column is one image, all are: one that is not will be named when it is read.
    hold_one: dict[str, bool] = {}
    for row in range(len(metadata)):
        of_row: dict[str, list[Any]] = {}
        for name in file_columns:
            path = metadata.columns[name][row]
            of_row[name] = _slices(path, config, hold_one.get(name, False))
            hold_one.setdefault(name, path is not None and of_row[name] == [one_image(Path(path))])
        counts = {name: len(cells) for name, cells in of_row.items()}
        if len({*counts.values()}) > 1:
            held = " and ".join(f"{count:,} in {name!r}" for name, count in counts.items())
            raise UsageError(
                f"the files of a row must hold as many images, got {held} in row {row} of the metadata: save them "
                "alike, or see --stack_axis"
            )
        numbers += [row] * len(of_row[file_columns[0]])
        for name, cells in of_row.items():
            slices[name] += cells
    other_columns = {name: cells for name, cells in metadata.columns.items() if name not in metadata.file_columns}
    columns: dict[str, Any] = {
        name: metadata_column(name, [cells[row] for row in numbers], is_of_files=False)
        for name, cells in other_columns.items()
    }
    features: dict[str, Any] = {**datasets.Features.from_arrow_schema(pyarrow.table(columns).schema)}
    labels = folder_classes([Path(cell["path"] if cell else "") for cell in slices[file_columns[0]]])
    if labels is not None and "label" not in columns:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=sorted({*labels}))
    features.update(dict.fromkeys(file_columns, slice_feature()))
    return datasets.Dataset.from_dict({**columns, **slices}, features=datasets.Features(features))


def _columns_of_files(metadata: Metadata, config: DataConfig) -> list[str]:
    """Return the columns of files that are read: that of the images, then that of the conditions.

    Raises:
        UsageError: When there is none of the conditions.
    """
    if config.condition_column not in metadata.file_columns:
        raise UsageError(
            f"condition_column must name a second column of files, got {config.condition_column!r}, none of "
            f"{metadata.file_columns}: --condition_column, without the ending _file_name"
        )
    images = config.image_column or next((c for c in metadata.file_columns if c != config.condition_column), None)
    read = [name for name in metadata.file_columns if name in (images, config.condition_column)]
    return sorted(read, key=lambda name: name == config.condition_column)


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
