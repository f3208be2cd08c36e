"""DataConfig: the settings that decide which images there are, and of what shape."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from hf_ddpm.runtime.files import look_at, read_mapping, require_writable_folder
from hf_ddpm.runtime.settings import GIVEN, check_paths, check_values, setting, typed_values


@dataclass(frozen=True)
class DataConfig:
    """The settings that decide which images there are, and how each becomes x_0."""

    dataset_name: str | None = setting(
        None,
        "`digits` (ships with the package), a Hub id, a folder of images or of parquet files, or a folder saved by "
        "`datasets`. Training runs the recipe `digits` with neither this nor `train_data_dir`, `config` or `recipe`.",
        group="data",
        resume="free",
        is_path=True,
    )
    train_data_dir: str | None = setting(
        None, "A folder of images; instead of `dataset_name`.", group="data", resume="free", is_path=True
    )
    train_split: str | None = setting(
        None,
        "The split to train on; of a folder of images, the name of a folder in it; default: `train`.",
        group="data",
        resume="fixed",
    )
    resolution: int | list[int] | None = setting(  # noqa: RUF009
        None,
        "The side of x_0 in pixels, or its height and width; default: the data's, if all images are of one size.",
        group="data",
        resume="fixed",
        at_least=1,
        num_values=2,
    )
    channels: int | None = setting(
        None,
        "The channels of x_0: 1 for gray, 3 for RGB, 4 for RGBA, of arrays as many as they have; default: the data's.",
        group="data",
        resume="fixed",
        at_least=1,
    )
    label_column: str | None = setting(
        None,
        "A column of classes or of numbers, or several, as angle,mass: the model is then conditioned on them.",
        group="data",
        resume="fixed",
    )
    random_flip: bool = setting(
        False, "Mirror half of the images; each epoch draws them anew.", group="data", resume="fixed"
    )
    center_crop: bool = setting(
        False,
        "Crop the middle of an image of another aspect ratio; without it, a new random part each epoch.",
        group="data",
        resume="fixed",
    )
    random_crop: bool = setting(
        False,
        "Crop images without resizing them: each epoch takes another part of each, of the size of `resolution`.",
        group="data",
        resume="fixed",
        only_with={"center_crop": False},
    )
    eval_fraction: float | None = setting(
        None,
        "The share of the images, in (0, 1), that is held out of the split to train on, as the split `test`; which "
        "ones is a function of their names, or of their content; default: none.",
        group="data",
        resume="fixed",
        above=0,
        below=1,
        only_with={"streaming": False},
    )
    group_column: str | None = setting(
        None,
        "A column of groups, as patient, or the `folder` or `file` of each image: no group has images in training and "
        "in the split that is held out.",
        group="data",
        resume="fixed",
        only_with={"streaming": False},
    )
    image_column: str | None = setting(
        None, "The column of images; needed only where there are several.", group="data", resume="free"
    )
    condition_column: str | None = setting(
        None,
        "A column of images or arrays that the images are made from: the model is then conditioned on them. They are "
        "cropped and mirrored as the images are.",
        group="data",
        resume="fixed",
        only_with={"streaming": False, "on_bad_image": "raise"},
    )
    dataset_config_name: str | None = setting(
        None,
        "The configuration of a Hub data set that has several.",
        group="data",
        resume="free",
        only_with={"dataset_name": GIVEN},
    )
    value_range: list[float] | None = setting(  # noqa: RUF009
        None,
        "The values of the data that become -1 and 1; default: the smallest and the largest that their type can hold, "
        "as 0 255 or 0 65535, and of floats those of the training data.",
        group="data",
        resume="fixed",
        num_values=2,
    )
    value_quantiles: list[float] | None = setting(  # noqa: RUF009
        None,
        "The quantiles of the values of arrays that become -1 and 1, as 0.001 0.999; what lies outside is clipped.",
        group="data",
        resume="fixed",
        num_values=2,
        only_with={"value_range": None, "streaming": False},
    )
    channel_axis: int | None = setting(
        None,
        "The axis of an array that its channels are along, as -1 of (H, W, C); default: the one before (H, W).",
        group="data",
        resume="fixed",
    )
    stack_axis: int | None = setting(
        None,
        "The axis of an array file along which it holds several images, as 0 of (N, H, W); default: 0 of four axes.",
        group="data",
        resume="fixed",
    )
    array_key: str | None = setting(
        None,
        "The array in each .npz or .h5 file, or several, as real,imag, which become channels; default: the only one.",
        group="data",
        resume="fixed",
    )
    display_channels: list[float] | None = setting(  # noqa: RUF009
        None,
        "The channels of arrays that pictures show: one in gray, or three as red, green and blue, as 3 2 1; the first "
        "is 0. Default: all of them, side by side in gray.",
        group="data",
        resume="free",
        at_least=0,
    )
    preserve_input_precision: bool | None = setting(
        None,
        "Keep 16-bit images in 16 bits, or with `--no_preserve_input_precision` make them 8-bit; default: keep gray "
        "ones. Color keeps them in PNG or TIFF files, of a folder or a table, which are then read as arrays.",
        group="data",
        resume="fixed",
    )
    on_bad_image: Literal["raise", "skip"] = setting(
        "raise",
        "What to do with an unreadable image: stop and name it, or leave it out and count it.",
        group="data",
        resume="free",
    )
    max_image_pixels: int | None = setting(
        None,
        "The most pixels of an image, against files that fill the memory; default: Pillow's limit, 179 million, and "
        "none of arrays.",
        group="data",
        resume="free",
        at_least=1,
    )
    cache_dir: str | None = setting(
        None,
        "The folder for downloads and decoded images; default: Hugging Face's.",
        group="data",
        resume="free",
        is_path=True,
    )
    streaming: bool = setting(
        False,
        "Read the images as they are needed, for data that are too large to decode into a cache first.",
        group="data",
        resume="fixed",
    )
    shuffle_buffer_images: int = setting(
        1000,
        "How many neighbors in a stream are shuffled among themselves.",
        group="data",
        resume="fixed",
        at_least=1,
        only_with={"streaming": True},
    )
    dataloader_num_workers: int = setting(
        0, "Processes that assemble batches; 0: the training process does.", group="data", resume="free", at_least=0
    )

    def __post_init__(self) -> None:
        # Caches and runs are compared by their settings, and so a square has one spelling.
        sides = self.resolution
        if isinstance(sides, list | tuple):
            is_square = len(sides) in (1, 2) and sides[0] == sides[-1]
            object.__setattr__(self, "resolution", sides[0] if is_square else [*sides])


def check_data_paths(config: DataConfig) -> None:
    """Look at each path of a config, and whether a cache that does not exist can be made.

    A cache that exists may be one that others have filled, and that nobody may write to.

    Raises:
        UsageError: When one cannot be what its setting says.
    """
    check_paths(config)
    if config.cache_dir is not None and not look_at("cache_dir", config.cache_dir).exists():
        require_writable_folder("cache_dir", look_at("cache_dir", config.cache_dir))


def of_conditions(config: DataConfig) -> DataConfig:
    """Return the settings that read the column of conditions as one of images.

    What settings say of colors, values and labels is said of the images, not of their conditions. `image_column` and
    `condition_column` are the same in them.
    """
    return replace(
        config,
        image_column=config.condition_column,
        channels=None,
        value_range=None,
        label_column=None,
        display_channels=None,
    )


def remedy_of_skipping(config: DataConfig) -> str:
    """Return the end of a message on a bad image, that such may be left out; "" where conditions need each image."""
    return "" if config.condition_column is not None else ", or leave out all such images with --on_bad_image skip"


def load_data_config(path: Path) -> DataConfig:
    """Load the settings of the data from the config.yaml of a run; those of training are left out.

    Raises:
        UsageError: When the file is damaged, or a value cannot work.
    """
    names = {each.name for each in fields(DataConfig)}
    given = {name: value for name, value in read_mapping(path).items() if name in names}
    config = DataConfig(**typed_values(DataConfig, given, str(path)))
    check_values(config)
    check_data_paths(config)
    return config


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of all that this package caches, which need not exist.

    Raises:
        UsageError: When it may not be read.
    """
    if config.cache_dir is None:
        import huggingface_hub  # which the command line does without

        return look_at("HF_HOME, the default of cache_dir,", huggingface_hub.constants.HF_HOME) / "hf_ddpm"
    return look_at("cache_dir", config.cache_dir) / "hf_ddpm"
