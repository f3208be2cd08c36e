"""The columns of a table that a run reads: those of images, and perhaps some of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ddpm.data.config import DataConfig
from hf_ddpm.runtime.errors import UsageError


def choose_columns(dataset: Any, config: DataConfig, with_conditions: bool = False) -> Any:
    """Select the column of images, not decoded, and after it those of labels if `label_column` is given.

    Args:
        dataset: A data set of `datasets`.
        config: The settings of the data.
        with_conditions: Whether the column that `condition_column` names comes last, not decoded either.

    Raises:
        UsageError: When a column does not exist or holds something else, or when the column of images must be named.
    """
    import datasets

    if config.condition_column is not None:
        check_condition_column(dataset.features, config.condition_column)
    column, labels = image_column(dataset.features, config), label_columns(config.label_column, dataset.features)
    if config.image_column is None:
        require_second_column(config, column)
    for label in labels:
        check_label_column(dataset, label, column)
    conditions = [config.condition_column] if with_conditions and config.condition_column is not None else []
    chosen = dataset.select_columns([column, *labels, *conditions])
    for name in (column, *conditions):
        if not holds_arrays(dataset.features[name]):
            chosen = chosen.cast_column(name, datasets.Image(decode=False))
    return chosen


def require_second_column(config: DataConfig, column: str | None) -> None:
    """Check that the conditions of images are none of these themselves.

    Args:
        config: The settings of the data.
        column: The column of images.

    Raises:
        UsageError: When they are.
    """
    if column is not None and config.condition_column == column:
        raise UsageError(
            f"condition_column must name a second column of images, got {column!r}, the first one: --condition_column"
        )


def holds_arrays(feature: Any) -> bool:
    """Return whether a column holds arrays: of `datasets`, or slices of files as `open_arrays` names them."""
    return holds_slices(feature) or type(feature).__name__ in ("Array2D", "Array3D")


def holds_slices(feature: Any) -> bool:
    """Return whether a column holds slices of files, as `slices_of` of arrays.py names them."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path", "slice"}


def encoded_images(dataset: Any, rows: slice) -> list[Any]:
    """Return the cells of the column of images in some rows; arrays in their own type."""
    column = dataset.column_names[0]
    if isinstance(dataset.features[column], dict) or not holds_arrays(dataset.features[column]):
        return dataset[rows][column]
    return cells_of(dataset.with_format("arrow")[rows][column])


def cells_of(column: Any) -> list[Any]:
    """Return the cells of a column of Arrow; those of arrays of `datasets` in their own type.

    Args:
        column: An array or a chunked array of Arrow.
    """
    dtype = getattr(column.type, "value_type", None) if hasattr(column.type, "shape") else None
    cells = column.to_pylist()
    return cells if dtype is None else [None if cell is None else np.asarray(cell, dtype) for cell in cells]


def column_of_arrays(arrays: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """Return arrays as a column of Arrow, and what `datasets` writes of it into the metadata of a parquet file.

    Args:
        arrays: (N, C, H, W).
    """
    import datasets
    import pyarrow as pa

    cells: Any = pa.array(np.ascontiguousarray(arrays).reshape(-1))
    for side in arrays.shape[:0:-1]:
        cells = pa.ListArray.from_arrays(pa.array(np.arange(0, len(cells) + 1, side, dtype=np.int32)), cells)
    # Without its type in the schema, `datasets` would take the column for nested lists.
    kind: Any = datasets.Array3D(shape=arrays.shape[1:], dtype=arrays.dtype.name)()
    feature = {"_type": "Array3D", "shape": [*arrays.shape[1:]], "dtype": arrays.dtype.name}
    return pa.ExtensionArray.from_storage(kind, cells), feature


def label_columns(label_column: str | None, features: Any) -> list[str]:
    """Return the names of the columns of labels; a column whose name holds a comma is one.

    Args:
        label_column: The setting.
        features: The columns that there are.

    Raises:
        UsageError: When a column is named twice.
    """
    if label_column is None:
        return []
    if label_column in features or "," not in label_column:
        return [label_column]
    names = [name.strip() for name in label_column.split(",")]
    if len({*names}) < len(names) or "" in names:
        raise UsageError(f"label_column must name each column once, got {label_column!r}: --label_column")
    return names


def check_label_column(dataset: Any, label: str, image_column: str) -> None:
    """Check that a column of labels is there, and holds labels.

    Raises:
        UsageError: When it is not, or holds something else.
    """
    if [*dataset.features] == [image_column]:
        raise UsageError(
            f"label_column must name a column of classes, got {label!r}, and there is none: in a folder of images, "
            "put each class in a folder of its own, or name the classes in metadata.csv"
        )
    if label not in dataset.features:
        raise UsageError(f"label_column must be one of {list(dataset.features)}, got {label!r}: --label_column")
    if not _holds_classes(dataset.features[label]):
        _require_no_empty_cell(dataset, label)
        if not holds_numbers(dataset.features[label]):
            raise UsageError(
                "label_column must hold numbers, classes or strings, "
                f"got {label!r} of {dataset.features[label]}: --label_column"
            )


def _require_no_empty_cell(dataset: Any, label: str) -> None:
    """Name an empty cell of a column of numbers."""
    dtype = str(getattr(dataset.features[label], "dtype", ""))
    if getattr(dataset, "num_rows", None) is not None and dtype.startswith(("float", "null")):  # a stream has no count
        require_numbers(label, dataset.select_columns([label])[:][label])


def holds_numbers(feature: Any) -> bool:
    """Return whether a column holds numbers that are no classes: whole ones are classes."""
    return str(getattr(feature, "dtype", "")).startswith("float")


def require_numbers(column: str, cells: Sequence[Any]) -> None:
    """Check that each cell of a column holds a finite number: an empty one makes whole numbers floats in tables.

    Raises:
        UsageError: When one does not.
    """
    for row, value in enumerate(cells):
        if value is None or value != value:
            raise UsageError(
                f"label_column must give each image a class or a number, got an empty cell in row {row} of "
                f"{column!r}: give it one, or leave the row out"
            )
        if abs(value) == float("inf"):
            raise UsageError(
                f"label_column must hold finite numbers, got {value} in row {row} of {column!r}: give it another, or "
                "leave the row out"
            )


def check_condition_column(features: Any, column: str) -> None:
    """Check that there is a column of conditions, which holds images, arrays or volumes.

    Raises:
        UsageError: When there is none.
    """
    names = [name for name, feature in features.items() if _holds_any_images(feature)]
    if column not in names and not _holds_bytes(features.get(column)):
        remedy = "--condition_column"
        if len(names) == 1:
            header = f"file_name,{column}_file_name"
            remedy = f"add one to the table; in a folder, a metadata.csv with {header} names both files of each image"
        raise UsageError(
            f"condition_column must name a second column of images, got {column!r}, none of {names}: {remedy}"
        )


def image_column(features: Any, config: DataConfig) -> str:
    """Return the name of the column of images.

    Raises:
        UsageError: When it must be named, does not exist, or holds something else.
    """
    column = config.image_column
    _require_no_volumes(features, config)
    image_columns = _image_columns(features)
    if column is None:
        image_columns = _image_columns(_without_conditions(features, config)) or image_columns
        if len(image_columns) == 1:
            return image_columns[0]
        problem = f"there is no column of images among {list(features)}"
        if image_columns:
            problem = f"there are several columns of images, {image_columns}"
        raise UsageError(f"image_column must name the images, got None: {problem}; give --image_column")
    if column not in features:
        raise UsageError(
            f"image_column must be one of {image_columns or list(features)}, got {column!r}: --image_column"
        )
    if column not in image_columns and not _holds_bytes(features[column]) and not holds_arrays(features[column]):
        raise UsageError(f"image_column must hold images, got {column!r} of {features[column]}: --image_column")
    return column


def _image_columns(features: Any) -> list[str]:
    """Return the names of the columns of images; without any, of those of arrays."""
    images = [name for name, feature in features.items() if _holds_images(feature)]
    return images or [name for name, feature in features.items() if holds_arrays(feature)]


def _without_conditions(features: Any, config: DataConfig) -> dict[str, Any]:
    """Return the columns but that of the conditions, which are not meant where no column of images is named."""
    return {name: feature for name, feature in features.items() if name != config.condition_column}


def volume_columns(features: Any, config: DataConfig) -> list[str]:
    """Return the names of the columns of volumes that are read: that of the images, and that of their conditions.

    That of the images is the one that is named, or the only one without images.
    """
    volumes: list[str] = [name for name, feature in features.items() if _holds_volumes(feature)]
    read = {config.image_column, config.condition_column}
    if config.image_column is None:
        others = _without_conditions(features, config)
        of_images = [name for name in volumes if name in others]
        is_alone = not any(_holds_images(feature) or holds_arrays(feature) for feature in others.values())
        read.update(of_images if len(of_images) == 1 and is_alone else ())
    return [name for name in volumes if name in read]


def _require_no_volumes(features: Any, config: DataConfig) -> None:
    """Check that what is read is no column of volumes, which become slices before unless they are streamed."""
    for name in volume_columns(features, config):
        raise UsageError(
            f"streaming must be off for a column of volumes, got {name!r}: their slices are counted before the first "
            "step; leave out --streaming"
        )
    possible = _without_conditions(features, config)
    volumes = [name for name, feature in possible.items() if _holds_volumes(feature)]
    others = [name for name, feature in possible.items() if _holds_images(feature) or holds_arrays(feature)]
    if config.image_column is None and len(volumes) > 1 and not others:
        raise UsageError(
            f"image_column must name the volumes, got None: there are several columns of them, {volumes}; give "
            "--image_column"
        )


def holds_files(feature: Any) -> bool:
    """Return whether a column holds files, or the bytes of some: images, volumes or others."""
    return _holds_images(feature) or _holds_bytes(feature) or _holds_volumes(feature)


def _holds_any_images(feature: Any) -> bool:
    return _holds_images(feature) or holds_arrays(feature) or _holds_volumes(feature)


def _holds_volumes(feature: Any) -> bool:
    return type(feature).__name__ == "Nifti"  # which older versions of `datasets` do not have


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):  # In parquet files that other tools wrote, an image is a struct of these two.
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image"


def _holds_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _holds_classes(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
