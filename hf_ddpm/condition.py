"""The images that a model makes images from, kept beside its scheduler in a file that stock diffusers does not read.

condition          c, an image of the size of x_0, which the network takes after x_t: its input is (x_t, c)
super-resolution   c is x_0 in a low resolution, enlarged again (Saharia et al. 2021, arXiv 2104.07636)
column             c stands in a column of the data, as in Palette (Saharia et al. 2021, arXiv 2111.05826); of arrays
                   it has a value range of its own, while a low resolution has that of x_0
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_ddpm.runtime.files import naming_damage, network_folder, read_mapping, write_atomically
from hf_ddpm.value_range import ValueRange, value_range_from

# In the folder of the scheduler, all of whose files diffusers downloads.
CONDITION_FILE = Path("scheduler", "condition.json")
# The folder and the component of a network that takes conditions: stock's pipelines ask for `unet`, and find none.
CONDITIONAL_NETWORK = "conditional_unet"
INPUT_OF_SUPER_RESOLUTION = "low resolution"


@dataclass(frozen=True)
class Condition:
    """The image that a model makes images from.

    Args:
        channels: The channels of a condition, 1, 3 or 4; of arrays any number.
        super_resolution: The factor by which x_0 was made smaller; None: the condition comes from a column.
        column: The name of the column; None for super-resolution, or where nobody has named it.
        noise: The largest standard deviation of the noise that was added to conditions in training.
        value_range: The values that -1 and 1 stand for in a column of arrays; None for images and super-resolution.
    """

    channels: int
    super_resolution: int | None = None
    column: str | None = None
    noise: float = 0.0
    value_range: ValueRange | None = None

    @property
    def label(self) -> str:
        """The word by which pictures call a condition."""
        return INPUT_OF_SUPER_RESOLUTION if self.super_resolution else self.column or "condition"


def describe_condition(condition: Condition) -> str:
    """Return in words what a model makes images from."""
    if condition.super_resolution is not None:
        return f"images of 1/{condition.super_resolution} of their height and width"
    what = "images" if condition.value_range is None else "arrays"
    column = f" of the column {condition.column}" if condition.column else ""
    values = "" if condition.value_range is None else f" ({condition.value_range})"
    return f"{what}{column}{values}"


def is_conditional(folder: Path) -> bool:
    """Return whether the model in a folder makes images from images."""
    return network_folder(folder).name == CONDITIONAL_NETWORK


def read_condition(folder: Path) -> Condition | None:
    """Read what the model in a pipeline's folder makes images from; None if no file says it.

    Raises:
        UsageError: When the file is damaged.
    """
    path = folder / CONDITION_FILE
    content = read_mapping(path, "save or download the model again")
    if not content:
        return None
    with naming_damage(f"{path} cannot be read", "save or download the model again"):
        values = content.pop("value_range", None)
        condition = Condition(**content, value_range=None if values is None else value_range_from(values))
        factor = condition.super_resolution
        if condition.channels < 1 or not (factor is None or (type(factor) is int and factor > 1)):
            raise ValueError(f"it must hold channels and a factor, got {content}")
    return condition


def write_condition(folder: Path, condition: Condition) -> None:
    """Keep what a model makes images from in a pipeline's folder."""
    content = asdict(condition)
    if condition.value_range is None:
        del content["value_range"]
    write_atomically(folder / CONDITION_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
