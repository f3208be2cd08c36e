"""The labels that a network is conditioned on: a column of classes, a column of numbers, or several columns.

    label            what an image is asked to be: a class, a number, or one of these for each of several columns
    network's label  what the network takes for it: the number of a class, a number on the scale of a timestep, or a
                     float for each column
    hidden           the network's label that stands for every class and every number; `class_dropout` trains it

A number stands in the network as 500 + 100 (value - mean) / std, because a `UNet2DModel` embeds it as it embeds a
timestep. A hidden one is -1000, far from all others.

Classes are kept in `scheduler/classes.json`, other labels in `scheduler/labels.json`; stock diffusers reads neither.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_ddpm.classes import Classes, read_classes, write_classes
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, write_atomically

if TYPE_CHECKING:
    import numpy as np

# In the folder of the scheduler, all of whose files diffusers downloads.
LABELS_FILE = Path("scheduler", "labels.json")
CENTER, SCALE = 500.0, 100.0
HIDDEN = -1000.0
# The quantiles that are kept of a column of numbers.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# People type the ends of a range as they are printed, with six digits.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class NetworkLabel:
    """A label as the network takes it, in the place of one in the units of the data.

    Args:
        value: A number for a column of numbers, one for each of several columns.
    """

    value: float | tuple[float, ...]


@dataclass(frozen=True)
class Values:
    """The numbers that a network is conditioned on: a column of them.

    Args:
        name: The name of the column.
        mean: The mean of the training images' numbers.
        std: Their standard deviation, above 0.
        quantiles: The smallest, a quarter, the median, three quarters, the largest.
        has_unconditional: Whether the network has learned what stands for every number.
    """

    name: str
    mean: float
    std: float
    quantiles: tuple[float, ...]
    has_unconditional: bool = False

    @property
    def unconditional(self) -> float | None:
        """The network's label that stands for every number; None if it has learned none."""
        return HIDDEN if self.has_unconditional else None

    @property
    def in_turn(self) -> tuple[float, ...]:
        """The numbers that a grid shows, one after the other: the quantiles."""
        return tuple(dict.fromkeys(self.quantiles))

    @property
    def titles(self) -> list[str]:
        """The titles of the rows of such a grid."""
        return [f"{self.name} = {value:g}" for value in self.in_turn]

    @property
    def range(self) -> str:
        """The smallest and the largest number, in words."""
        return f"{self.quantiles[0]:g} to {self.quantiles[-1]:g}"

    def __str__(self) -> str:
        return f"{self.name}: {self.range}"

    def encode(self, values: Any) -> Any:
        """Return numbers as the network takes them: 500 + 100 (value - mean) / std."""
        return CENTER + SCALE * (values - self.mean) / self.std

    def read(self, label: Any) -> float:
        """Return a number that is asked for, after checking it.

        Args:
            label: The number, or a text that holds it.

        Raises:
            UsageError: When it is none, or outside of the range of the training images.
        """
        try:
            if isinstance(label, bool) or not isinstance(label, str | Real):
                raise ValueError
            value = float(label)
        except ValueError:
            raise UsageError(
                f"class_labels must be numbers for {self.name!r}, got {label!r}: give one from {self.range}"
            ) from None
        low, high = self.quantiles[0], self.quantiles[-1]
        slack = _TOLERANCE * max(abs(low), abs(high))
        if not low - slack <= value <= high + slack:
            raise UsageError(
                f"class_labels must be in the range of the training images, for {self.name!r} {self.range}, got "
                f"{value:g}: ask for a number in it"
            )
        return value

    def number_of(self, label: Any) -> float:
        """Return the network's label of a number, as `read` takes it."""
        if isinstance(label, NetworkLabel):
            assert isinstance(label.value, float)
            return label.value
        return self.encode(self.read(label))

    def table(self, labels: Sequence[Any]) -> dict[str, list[Any]]:
        """Return labels as a column of a table, in the units of the data."""
        return {"label": [*labels]}


@dataclass(frozen=True)
class Columns:
    """A combination of several labels: columns of classes and of numbers.

    Args:
        columns: The columns by their names, two or more.
        has_unconditional: Whether the network has learned what stands for every label, also in one column alone.
    """

    columns: tuple[tuple[str, Classes | Values], ...]
    has_unconditional: bool = False

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(name for name, _ in self.columns)

    @property
    def hidden(self) -> tuple[float, ...]:
        """The network's label of each column that stands for all others of it."""
        return tuple(float(len(of)) if isinstance(of, Classes) else HIDDEN for _, of in self.columns)

    @property
    def unconditional(self) -> tuple[float, ...] | None:
        """The network's label that stands for every label; None if it has learned none."""
        return self.hidden if self.has_unconditional else None

    @property
    def in_turn(self) -> tuple[dict[str, Any], ...]:
        """The labels that a grid shows: row r has the r-th of each column, which begins anew after its last."""
        shown = {name: of.names if isinstance(of, Classes) else of.in_turn for name, of in self.columns}
        count = max(map(len, shown.values()))
        return tuple({name: rows[row % len(rows)] for name, rows in shown.items()} for row in range(count))

    @property
    def titles(self) -> list[str]:
        """The titles of the rows of such a grid."""
        return [", ".join(f"{name} = {_text(value)}" for name, value in row.items()) for row in self.in_turn]

    def __str__(self) -> str:
        return "; ".join(describe_labels(of, name) for name, of in self.columns)

    def read(self, label: Any) -> dict[str, Any]:
        """Return a label that is asked for, after checking it: the name of a class or a number for each column.

        Args:
            label: A mapping from names of columns, or a text such as "digit=7, slant=0.2". A column that is left out
                is hidden, and None in the result.

        Raises:
            UsageError: When there is no such column, class or number, or a column is left out that the network needs.
        """
        given = _parse(label) if isinstance(label, str) else label
        if not isinstance(given, Mapping):
            raise UsageError(
                f"class_labels must say the column of each label, got {label!r}: give a mapping, as "
                f"{dict(self.in_turn[0])}"
            )
        for name in given:
            if name not in self.names:
                near = difflib.get_close_matches(str(name), self.names, n=1, cutoff=0.6)
                hint = f"do you mean {near[0]!r}?" if near else f"the columns are {', '.join(self.names)}"
                raise UsageError(f"class_labels must name columns of the model, got {name!r}: {hint}")
        missing = [name for name in self.names if given.get(name) is None]
        if missing and not self.has_unconditional:
            raise UsageError(
                f"class_labels must hold all columns of the model, got none for {missing[0]!r}: give it, or take a "
                "model that was trained with class_dropout"
            )
        return {name: None if name in missing else _read_column(name, of, given[name]) for name, of in self.columns}

    def number_of(self, label: Any) -> tuple[float, ...]:
        """Return the network's label of what `read` takes: a float for each column."""
        if isinstance(label, NetworkLabel):
            assert isinstance(label.value, tuple)
            return label.value
        values = self.read(label)
        return tuple(
            hidden if values[name] is None else float(of.number_of(values[name]))
            for (name, of), hidden in zip(self.columns, self.hidden, strict=True)
        )

    def table(self, labels: Sequence[Any]) -> dict[str, list[Any]]:
        """Return labels as columns of a table, in the units of the data."""
        rows = [self.read(label) for label in labels]
        return {name: [row[name] for row in rows] for name in self.names}


Labels: TypeAlias = Classes | Values | Columns


def values_of(name: str, numbers: np.ndarray, has_unconditional: bool = False) -> Values:
    """Return the numbers of a column of the training images.

    Args:
        name: The name of the column.
        numbers: (N,) float64, all finite.
        has_unconditional: As of `Values`.

    Raises:
        UsageError: When they are all equal: there is nothing to learn of them.
    """
    import numpy as np

    if numbers.min() == numbers.max():
        raise UsageError(
            f"label_column must hold more than one number, got {numbers[0]:g} for all {len(numbers):,} images in "
            f"{name!r}: leave it out"
        )
    quantiles = np.quantile(numbers, QUANTILES, method="nearest")
    return Values(name, float(numbers.mean()), float(numbers.std()), tuple(quantiles.tolist()), has_unconditional)


def with_unconditional(labels: Labels, has_unconditional: bool) -> Labels:
    """Return labels of which there is, or is not, one that stands for all of them, also in each column."""
    if isinstance(labels, Columns):
        columns = tuple((name, replace(of, has_unconditional=has_unconditional)) for name, of in labels.columns)
        return Columns(columns, has_unconditional)
    return replace(labels, has_unconditional=has_unconditional)


def scales_of(labels: Labels | None) -> dict[str, list[float]]:
    """Return mean and standard deviation of each column of numbers, by which the network takes them."""
    if isinstance(labels, Columns):
        return {name: [of.mean, of.std] for name, of in labels.columns if isinstance(of, Values)}
    return {labels.name: [labels.mean, labels.std]} if isinstance(labels, Values) else {}


def on_scales(labels: Labels | None, scales: Mapping[str, Sequence[float]]) -> Labels | None:
    """Return labels whose numbers the network takes by other means and standard deviations, where these are given."""
    if isinstance(labels, Columns):
        return replace(labels, columns=tuple((name, _on_scale(name, of, scales)) for name, of in labels.columns))
    return _on_scale(labels.name, labels, scales) if isinstance(labels, Values) else labels


def structure_of(labels: Labels) -> tuple[Any, ...]:
    """Return what two models must share of their labels for one to begin with the network of the other."""
    if isinstance(labels, Columns):
        return tuple((name, of.names if isinstance(of, Classes) else None) for name, of in labels.columns)
    return ("classes", labels.names) if isinstance(labels, Classes) else ("numbers", labels.name)


def describe_labels(labels: Labels, name: str = "") -> str:
    """Return in words which labels there are."""
    if isinstance(labels, Classes):
        return f"{name}: {len(labels):,} classes" if name else f"{len(labels):,} classes"
    return str(labels)


def takes_floats(labels: Labels) -> bool:
    """Return whether the network's labels are floating-point numbers."""
    return not isinstance(labels, Classes)


def read_labels(folder: Path) -> Labels | None:
    """Read the labels that are kept in a pipeline's folder; None if there are none.

    Raises:
        UsageError: When a file is damaged.
    """
    path = folder / LABELS_FILE
    content = read_mapping(path, "save or download the model again")
    if not content:
        return read_classes(folder)
    with naming_damage(f"{path} cannot be read", "save or download the model again"):
        has_unconditional = content["has_unconditional"]
        columns = [(str(each["name"]), _column_of(each, has_unconditional)) for each in content["columns"]]
        if not columns or not isinstance(has_unconditional, bool):
            raise ValueError(f"it must hold columns, and whether a label may be hidden, got {content}")
        if len(columns) > 1:
            return Columns(tuple(columns), has_unconditional)
        return columns[0][1]


def write_labels(folder: Path, labels: Labels) -> None:
    """Keep the labels in a pipeline's folder."""
    if isinstance(labels, Classes):
        write_classes(folder, labels)
        return
    columns = labels.columns if isinstance(labels, Columns) else ((labels.name, labels),)
    content = {
        "columns": [
            {"name": name, "classes": of.names}
            if isinstance(of, Classes)
            else {"name": name, "mean": of.mean, "std": of.std, "quantiles": of.quantiles}
            for name, of in columns
        ],
        "has_unconditional": labels.has_unconditional,
    }
    write_atomically(folder / LABELS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _column_of(content: Mapping[str, Any], has_unconditional: bool) -> Classes | Values:
    if "classes" in content:
        return Classes(tuple(map(str, content["classes"])), has_unconditional)
    quantiles = tuple(map(float, content["quantiles"]))
    values = Values(str(content["name"]), float(content["mean"]), float(content["std"]), quantiles, has_unconditional)
    if not (math.isfinite(values.mean) and values.std > 0 and len(quantiles) == len(QUANTILES)):
        raise ValueError(f"a column of numbers must have a mean, a spread and quantiles, got {dict(content)}")
    return values


def _read_column(name: str, labels: Classes | Values, label: Any) -> Any:
    if isinstance(labels, Values):
        return labels.read(label)
    try:
        return labels.names[labels.number_of(label)]
    except UsageError as error:
        raise UsageError(f"{error}; the column is {name!r}") from error


def _parse(text: str) -> dict[str, str]:
    """Return the labels of a text such as "digit=7, slant=0.2"."""
    labels: dict[str, str] = {}
    # A comma in the name of a class is not followed by another column.
    for part in re.split(r",\s*(?=[^,=]+=)", text):
        name, separator, value = part.partition("=")
        if not separator or name.strip() in labels:
            raise UsageError(
                f"class_labels must say the column of each label once, got {text!r}: write COLUMN=LABEL, COLUMN=LABEL"
            )
        labels[name.strip()] = value.strip()
    return labels


def _on_scale(name: str, labels: Any, scales: Mapping[str, Sequence[float]]) -> Any:
    if isinstance(labels, Classes) or name not in scales:
        return labels
    mean, std = scales[name]
    return replace(labels, mean=mean, std=std)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
