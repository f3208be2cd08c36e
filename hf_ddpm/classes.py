"""The classes of a model, kept beside its scheduler in a file that stock diffusers does not read.

    class           a number k in [0, K), and its name
    unconditional   the embedding K: it stands for every class, and is what `class_dropout` trains

A network that was trained with `class_dropout` has K + 1 embeddings. The last is no class of the data, and no command
draws it as one.
"""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, write_atomically

# In the folder of the scheduler, all of whose files diffusers downloads.
CLASSES_FILE = Path("scheduler", "classes.json")
MAX_NAMED = 10


@dataclass(frozen=True)
class Classes:
    """The classes that a network is conditioned on.

    Args:
        names: The name of each class, in the order of their numbers; at least one.
        has_unconditional: Whether the network has one more embedding, which stands for every class.
        is_named: Whether somebody has named them. Else their names are their numbers, and there may be one too many:
            nobody knows whether the last embedding stands for every class.
    """

    names: tuple[str, ...]
    has_unconditional: bool = False
    is_named: bool = True

    def __len__(self) -> int:
        return len(self.names)

    @property
    def unconditional(self) -> int | None:
        """The embedding that stands for every class, K; None if the network has none."""
        return len(self.names) if self.has_unconditional else None

    @property
    def num_embeddings(self) -> int:
        """The number of embeddings of the network, K or K + 1."""
        return len(self.names) + self.has_unconditional

    @property
    def in_turn(self) -> range:
        """The classes that a grid shows, one after the other."""
        return range(len(self.names))

    @property
    def titles(self) -> list[str]:
        """The titles of the rows of such a grid."""
        return [*self.names]

    def read(self, label: Any) -> int:
        """Return the number of a class that is asked for; see `number_of`."""
        return self.number_of(label)

    def table(self, labels: Sequence[int]) -> dict[str, list[Any]]:
        """Return classes as a column of a table: their numbers."""
        return {"label": [*labels]}

    def number_of(self, label: Any) -> int:
        """Return the number of a class.

        Args:
            label: Its name, or its number; a text that is no name may hold the number.

        Raises:
            UsageError: When there is no such class; the message names the nearest one.
        """
        if isinstance(label, str):
            if label in self.names:
                return self.names.index(label)
            alike = [k for k, name in enumerate(self.names) if name.casefold() == label.strip().casefold()]
            if len(alike) == 1:
                return alike[0]
            if not label.strip().isdecimal():
                raise UsageError(f"class_labels must name a class, got {label!r}: {self._nearest(label)}")
        try:
            number = int(label) if isinstance(label, str) else operator.index(label)
        except TypeError:
            raise UsageError(f"class_labels must be names or whole numbers, got {label!r}") from None
        if not 0 <= number < len(self.names):
            raise UsageError(f"class_labels must be in [0, {len(self.names)}), got {number}: {self._list()}")
        return number

    def _nearest(self, label: str) -> str:
        folded = {name.casefold(): name for name in self.names}
        near = difflib.get_close_matches(label.strip().casefold(), folded, n=1, cutoff=0.6)
        return f"do you mean {folded[near[0]]!r}?" if near else self._list()

    def _list(self) -> str:
        names = ", ".join(self.names[:MAX_NAMED])
        return f"the classes are {names}{', ...' if len(self.names) > MAX_NAMED else ''}"


def numbered_classes(count: int) -> Classes:
    """Return the classes of a network that nobody has named: their names are their numbers."""
    return Classes(tuple(map(str, range(count))), is_named=False)


def read_classes(folder: Path) -> Classes | None:
    """Read the classes that are kept in a pipeline's folder; None if there are none.

    Raises:
        UsageError: When the file is damaged.
    """
    path = folder / CLASSES_FILE
    content = read_mapping(path, "remove it")
    if not content:
        return None
    with naming_damage(f"{path} cannot be read", "remove it"):
        names, has_unconditional = content["names"], content["has_unconditional"]
        if not names or not all(isinstance(name, str) for name in names) or not isinstance(has_unconditional, bool):
            raise ValueError(f"it must hold names of classes, and whether there is one more, got {content}")
        return Classes(tuple(names), has_unconditional)


def write_classes(folder: Path, classes: Classes) -> None:
    """Keep the classes in a pipeline's folder."""
    content = {"names": classes.names, "has_unconditional": classes.has_unconditional}
    write_atomically(folder / CLASSES_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_embeddings(classes: Classes, num_embeddings: int | None) -> None:
    """Check that a network has the embeddings of its classes.

    Raises:
        UsageError: When it has another number, so that the names are those of another model.
    """
    if num_embeddings != classes.num_embeddings:
        raise UsageError(
            f"{CLASSES_FILE} must be of the model's network, got {classes.num_embeddings} classes for "
            f"{num_embeddings} embeddings: remove it, or save the model again"
        )
