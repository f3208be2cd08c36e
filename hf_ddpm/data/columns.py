"""The columns of a table that a run reads: those of images, and perhaps one of classes."""

from __future__ import annotations

from typing import Any

from hf_ddpm.data.config import DataConfig
from hf_ddpm.runtime.errors import UsageError


def choose_columns(dataset: Any, config: DataConfig, with_conditions: bool = False) -> Any:
    """Select the column of images, not decoded, and after it the column of classes if `label_column` is given.

    Args:
        dataset: A data set of `datasets`.
        config: The settings of the data.
        with_conditions: Whether the column that `condition_column` names comes last, not decoded either.

    Raises:
        UsageError: When a column does not exist or holds something else, or when the column of images must be named.
    """
    import datasets

    if config.condition_column is not None:
        _check_condition_column(dataset.features, config.condition_column)
    column, label = _image_column(dataset.features, config), config.label_column
    if config.condition_column == column:
        raise UsageError(
            f"condition_column must name a second column of images, got {column!r}, the first one: --condition_column"
        )
    if label is not None and [*dataset.features] == [column]:
        raise UsageError(
            f"label_column must name a column of classes, got {label!r}, and there is none: in a folder of images, "
            "put each class in a folder of its own, or name the classes in metadata.csv"
        )
    if label is not None and label not in dataset.features:
        raise UsageError(f"label_column must be one of {list(dataset.features)}, got {label!r}: --label_column")
    if label is not None and not _holds_classes(dataset.features[label]):
        _require_no_empty_cell(dataset, label)
        raise UsageError(
            "label_column must hold integers, classes or strings, "
            f"got {label!r} of {dataset.features[label]}: --label_column"
        )
    conditions = [config.condition_column] if with_conditions and config.condition_column is not None else []
    chosen = dataset.select_columns([column, *([] if label is None else [label]), *conditions])
    for name in (column, *conditions):
        chosen = chosen.cast_column(name, datasets.Image(decode=False))
    return chosen


def _require_no_empty_cell(dataset: Any, label: str) -> None:
    """Name an empty cell of a column of numbers: by it, whole numbers become floats in tables."""
    rows = getattr(dataset, "num_rows", None)  # a stream has none
    if rows is None or not str(getattr(dataset.features[label], "dtype", "")).startswith(("float", "null")):
        return
    for row, value in enumerate(dataset.select_columns([label])[:][label]):
        if value is None or value != value:
            raise UsageError(
                f"label_column must give each image a class, got an empty cell in row {row} of {label!r}: "
                "give it one, or leave the row out"
            )


def _check_condition_column(features: Any, column: str) -> None:
    names = [name for name, feature in features.items() if _holds_images(feature)]
    if column not in names and not _holds_bytes(features.get(column)):
        raise UsageError(
            f"condition_column must name a second column of images, got {column!r}, none of {names}: "
            "--condition_column"
        )


def _image_column(features: Any, config: DataConfig) -> str:
    column = config.image_column
    image_columns = [name for name, feature in features.items() if _holds_images(feature)]
    if column is None:
        if len(image_columns) > 1:
            image_columns = [name for name in image_columns if name != config.condition_column]
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
    if column not in image_columns and not _holds_bytes(features[column]):
        raise UsageError(f"image_column must hold images, got {column!r} of {features[column]}: --image_column")
    return column


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):  # In parquet files that other tools wrote, an image is a struct of these two.
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image"


def _holds_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _holds_classes(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
