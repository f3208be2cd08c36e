"""The images of a data set, and the images that they are made from: both columns from the cache.

conditions   the column `condition_column`, read as one of images by the settings of `of_conditions`; each image of it
             belongs to the image of the same number
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_ddpm.data.arrays import SETTINGS_OF_BOTH, require_differing, require_no_array_settings
from hf_ddpm.data.cache import Accept, ImageCache, files_of, format_of_column, load_column
from hf_ddpm.data.columns import choose_columns, encoded_images, require_second_column
from hf_ddpm.data.config import DataConfig, of_conditions
from hf_ddpm.data.decoding import is_read_as_array
from hf_ddpm.data.given import GivenImages, open_given
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.data.volumes import with_slices
from hf_ddpm.image_size import format_size, to_resolution
from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

X_0 = "x_0"


def load_images(config: DataConfig, accept: Accept | None = None, dataset: Dataset | None = None) -> ImageCache:
    """Return the images of the split `train`; the first call decodes and resizes them, later ones map the file.

    If `channels` is left open, gray images have 1 channel and others 3. Transparency is composited over white unless
    there are 4 channels. Gray images of 16 bits keep them; Pillow reads 16-bit color as 8-bit, and of an animation the
    first frame is taken, which `losses` counts. Images are resized so that they cover the size of x_0, and with
    `center_crop` cropped to it; with `random_crop` they stay as large as they are. With `condition_column`, the images
    of that column come with them.

    Args:
        config: The settings of the data.
        accept: A function of the size and the channels of the images, and of the type of arrays, None for images and
            X_0 for x_0 of the user's code; it is called before they are decoded.
        dataset: A data set of `datasets` to take instead of the one that the settings name.

    Raises:
        UsageError: When `open_dataset` raises it, an image is unreadable and `on_bad_image` is "raise", no image is
            readable, or `resolution` or `channels` is left open and the images do not decide it; also when the
            image of a row and its condition have different shapes.
    """
    if config.condition_column is None:
        images = load_column(config, accept, dataset)
        require_differing(images.value_range)
        return images
    require_second_column(config, config.image_column)
    _check_settings_of_both(config, dataset)
    images = load_column(config, accept, dataset)
    require_differing(images.value_range)
    of_column, files = replace(of_conditions(config), resolution=to_resolution(images.size)), None
    # The images decide which are held out, and what is said of them may tell that files are arrays.
    if config.eval_fraction is not None or (images.value_range is not None and dataset is None):
        dataset, files = open_dataset(config, with_conditions=True), files_of(find_source(config), config)
        of_column = replace(of_column, eval_fraction=None, group_column=None)
    conditions = _in_own_range(load_column(of_column, None, dataset, files), config)
    unequal = np.flatnonzero((images.index[:, 1:] != conditions.index[:, 1:]).any(axis=1))
    if len(unequal):
        row = int(unequal[0])
        (height, width), (other_height, other_width) = images.index[row, 1:], conditions.index[row, 1:]
        resized = "" if config.random_crop else f", both resized to cover {format_size(images.size)}"
        remedy = "save them in one size" if config.random_crop else "crop them alike, or give --center_crop"
        raise UsageError(
            f"condition_column must hold images of the shape of their images, got {other_height}x{other_width} for "
            f"{height}x{width} in row {row}{resized}: {remedy}"
        )
    fingerprint = hashlib.sha256(f"{images.fingerprint} {conditions.fingerprint}".encode()).hexdigest()
    return replace(images, conditions=conditions, fingerprint=fingerprint)


def load_dataset(dataset: Any, config: DataConfig, accept: Accept | None) -> ImageCache | GivenImages:
    """Return the images of a data set that was passed: of `datasets` from the cache, of others item by item.

    Args:
        dataset: A `datasets.Dataset`, or any map-style data set; see data/given.py.
        config: The settings of the data.
        accept: As of `load_images`.

    Raises:
        UsageError: When it is neither, or its images cannot be read.
    """
    import datasets

    # A transform of the user's own decides what an item is, and the cache would not see it.
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
        return load_images(config, accept, dataset)
    if config.label_column is not None or config.image_column is not None:
        raise UsageError("label_column and image_column are for data sets of `datasets`: items name theirs `label`")
    if config.condition_column is not None:
        raise UsageError(
            f"condition_column is for data sets of `datasets`, got {config.condition_column!r} for a "
            f"{type(dataset).__name__}: make one of it, or leave it out"
        )
    images = open_given(dataset, config)
    if accept is not None:
        accept(images.size, images.channels, X_0 if images.is_x_0 else None)
    return images


def dtype_of_conditions(config: DataConfig, dataset: Dataset | None = None) -> str | None:
    """Return the type of the arrays of `condition_column`, by the first; None for images.

    Args:
        config: The settings of the data.
        dataset: As of `load_images`.
    """
    column = _open_both(config, dataset).select_columns([config.condition_column])
    return format_of_column(column, of_conditions(config)).array_dtype


def _open_both(config: DataConfig, dataset: Dataset | None) -> Any:
    """Return the columns of the images and of their conditions, in this order but for labels between them."""
    if dataset is None:
        return open_dataset(config, with_conditions=True)
    return choose_columns(with_slices(dataset, config), config, with_conditions=True)


def _check_settings_of_both(config: DataConfig, dataset: Dataset | None) -> None:
    """Check that the images or their conditions are arrays where a setting says something of either.

    Raises:
        UsageError: When neither are.
    """
    if all(getattr(config, name) is None for name in SETTINGS_OF_BOTH):
        return
    table = _open_both(config, dataset)
    columns = (table.select_columns([name]) for name in (table.column_names[0], table.column_names[-1]))
    if not any(is_read_as_array(encoded_images(column, slice(0, 1))[0], config) for column in columns):
        require_no_array_settings(config)


def _in_own_range(conditions: ImageCache, config: DataConfig) -> ImageCache:
    """Return conditions of which -1 and 1 stand for their own smallest and largest value, or their quantiles.

    So do integers, which as images have the range of their type: no likelihood counts the bins of conditions.
    """
    values = conditions.value_range
    if values is None or config.value_quantiles is not None:
        return conditions
    low, high = map(float, conditions.limits)
    return conditions.in_range(replace(values, low=low, high=high))
