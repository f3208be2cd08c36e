"""The labels of images: what the columns of a table hold, and what a model's network takes for it.

raw labels        as the data have them: the numbers of classes, (N,) int64, of one column of classes; else float64,
                  (N,) of one column of numbers, (N, number of columns) of several columns
network's labels  what the network takes for them (hf_ddpm/labels.py): int64 or float32, in the same shape
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from hf_ddpm.classes import Classes
from hf_ddpm.data.columns import holds_numbers, require_numbers
from hf_ddpm.labels import Columns, Labels, NetworkLabel, Values, values_of
from hf_ddpm.runtime.errors import UsageError


class LabelColumn(NamedTuple):
    """The content of a column of labels.

    Args:
        name: Its name.
        class_names: The names of its classes; None if it holds numbers.
    """

    name: str
    class_names: list[str] | None


class RawLabels(NamedTuple):
    """The labels of a table.

    Args:
        values: The raw labels; None without any.
        class_names: The names of the classes of one column of classes, where the data tell them.
        columns: What the columns hold; None for one column of classes, or none.
    """

    values: np.ndarray | None = None
    class_names: list[str] | None = None
    columns: list[LabelColumn] | None = None


def find_labels(cells: Mapping[str, Sequence[Any]], features: Mapping[str, Any]) -> RawLabels:
    """Return the labels of the columns of a table.

    Args:
        cells: The cells of each column of labels, by its name.
        features: What `datasets` says of each column.

    Raises:
        UsageError: When a cell is empty, or no finite number in a column of numbers.
    """
    if not cells:
        return RawLabels()
    names = [*cells]
    if len(names) == 1 and not holds_numbers(features[names[0]]):
        return RawLabels(*_classes_in(names[0], cells[names[0]], features[names[0]]))
    columns, values = [], []
    for name in names:
        if holds_numbers(features[name]):
            require_numbers(name, cells[name])
            columns.append(LabelColumn(name, None))
            values.append(np.array(cells[name], "<f8"))
        else:
            numbers, class_names = _classes_in(name, cells[name], features[name])
            class_names = class_names or [*map(str, range(int(numbers.max()) + 1))]
            columns.append(LabelColumn(name, class_names))
            values.append(numbers.astype("<f8"))
    return RawLabels(values[0] if len(names) == 1 else np.stack(values, axis=1), None, columns)


def labels_of(columns: Sequence[LabelColumn], values: np.ndarray, has_unconditional: bool) -> Values | Columns:
    """Return the labels that a network is to be conditioned on, from those of its training images.

    Args:
        columns: What the columns hold, of which one alone is of numbers.
        values: The raw labels, (N,) or (N, number of columns).
        has_unconditional: Whether a label may be hidden.

    Raises:
        UsageError: When all numbers of a column are equal.
    """
    parts: list[tuple[str, Classes | Values]] = []
    for (name, class_names), of_column in zip(columns, _by_column(values), strict=True):
        if class_names is None:
            parts.append((name, values_of(name, of_column, has_unconditional)))
        else:
            parts.append((name, Classes(tuple(class_names), has_unconditional)))
    if len(parts) > 1:
        return Columns(tuple(parts), has_unconditional)
    (_, only), *_ = parts
    assert isinstance(only, Values)
    return only


def with_network_labels(images: Any, labels: Labels | None) -> Any:
    """Return images whose labels are what a model's network takes; classes of one column are already.

    Args:
        images: An `ImageCache` or `ImageStream` with raw labels, or other images without columns of labels.
        labels: The labels of the model.

    Raises:
        UsageError: When the columns hold other labels than the model's.
    """
    columns: Sequence[LabelColumn] | None = getattr(images, "label_columns", None)
    if labels is None or isinstance(labels, Classes):
        if columns is not None:
            given = ", ".join(column.name for column in columns)
            wanted = "no labels" if labels is None else f"{len(labels)} classes"
            raise UsageError(f"label_column must hold what the model takes, {wanted}, got {given}: give another")
        return images
    if images.labels is None:
        return images
    if columns is None:
        raise UsageError(f"label_column must hold what the model takes, {labels}, got one column of classes")
    network_labels = _network_labels(columns, images.labels, labels)
    return replace(images, labels=network_labels, label_columns=None)


def label_list(images: Any, indices: np.ndarray) -> list[Any] | None:
    """Return the labels of some images as a pipeline takes them; None without labels.

    Args:
        images: Images with labels of a network.
        indices: Which of them, (n,).
    """
    if images.labels is None:
        return None
    assert images.label_columns is None
    return [network_label(label) for label in images.labels[indices]]


def network_label(label: np.generic | np.ndarray) -> int | NetworkLabel:
    """Return a network's label as a pipeline takes it.

    Args:
        label: The number of a class, an integer; or of other labels a number or an array, of a floating-point type.
    """
    if np.issubdtype(label.dtype, np.integer):
        return int(label)
    return NetworkLabel(tuple(label.tolist()) if label.ndim else float(label))


def _network_labels(columns: Sequence[LabelColumn], values: np.ndarray, labels: Values | Columns) -> np.ndarray:
    if isinstance(labels, Values):
        if len(columns) > 1:
            names = ", ".join(column.name for column in columns)
            raise UsageError(f"label_column must be the one that the model takes, {labels.name}, got {names}")
        return labels.encode(values).astype(np.float32)
    of_name = {column.name: (column, part) for column, part in zip(columns, _by_column(values), strict=True)}
    if {*of_name} != {*labels.names}:
        raise UsageError(
            f"label_column must name the columns that the model takes, {','.join(labels.names)}, got "
            f"{','.join(of_name)}"
        )
    return np.stack([_encoded(of, *of_name[name]) for name, of in labels.columns], axis=1)


def _encoded(labels: Classes | Values, column: LabelColumn, values: np.ndarray) -> np.ndarray:
    if isinstance(labels, Values) != (column.class_names is None):
        wanted = "numbers" if isinstance(labels, Values) else "classes"
        raise UsageError(f"label_column must hold {wanted} in {column.name!r}, as the model takes them")
    if isinstance(labels, Values):
        return labels.encode(values).astype(np.float32)
    assert column.class_names is not None
    number_of = {name: number for number, name in enumerate(labels.names)}
    present = {column.class_names[int(number)] for number in np.unique(values)}
    if unknown := sorted(present - number_of.keys()):
        raise UsageError(
            f"label_column must hold the model's classes in {column.name!r}, {', '.join(labels.names)}, got "
            f"{unknown[0]!r}: leave its images out"
        )
    numbers = np.array([number_of.get(name, -1) for name in column.class_names], np.float32)
    return numbers[values.astype(np.int64)]


def _by_column(values: np.ndarray) -> list[np.ndarray]:
    return [values] if values.ndim == 1 else [*values.T]


def _classes_in(column: str, values: Sequence[Any], feature: Any) -> tuple[np.ndarray, list[str] | None]:
    """Return the class of each row, (N,) int64, and the names of the classes where the data tell them.

    Integers that are not exactly 0, 1, ..., and strings, are numbered in their sorted order.
    """
    names: list[str] | None = getattr(feature, "names", None)
    allowed = set(range(len(names))) if names is not None else set(values) - {None}
    for row, value in enumerate(values):
        if value not in allowed:
            raise UsageError(
                f"label_column must give each image a class, got {'an empty cell' if value is None else value} in row "
                f"{row} of {column!r}: "
                "give it one, or leave the row out"
            )
    distinct = sorted(allowed)
    if names is None and distinct != list(range(len(distinct))):
        names = [str(value) for value in distinct]
        number_of = {value: number for number, value in enumerate(distinct)}
        values = [number_of[value] for value in values]
    return np.array(values, "<i8"), names
