"""A data set that the user's own code gives to `train`: read item by item, as it is needed.

item    a PIL image; float32 values (C, H, W) in [-1, 1], which are x_0; or a dict with either as `image`, and an
        integer `label` where there are classes. It is a function of its index, so that a resumed run sees the same.
planes  as in decoding.py, or x_0 itself, float32 (C, H, W)
"""

from __future__ import annotations

import hashlib
import json
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from hf_ddpm.data.arrays import ARRAY_SETTINGS
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import format_of
from hf_ddpm.data.image_format import (
    ImageFormat,
    InFormat,
    check_keeps_precision,
    check_matches_format,
    losses_of,
    without_opaque,
)
from hf_ddpm.data.planes import NeedsSixteenBits, to_planes
from hf_ddpm.image_size import to_resolution
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.value_range import Scale, ValueRange

NAME = "the data set that was passed to train()"


@dataclass(frozen=True, eq=False)
class GivenImages(InFormat):
    """The images of a map-style data set, read when they are needed; as `ImageCache`, but without a file.

    Args:
        dataset: What has a length, and an item for each index in [0, N).
        image_format: The format of PIL images; of x_0 its size and channels.
        is_x_0: Whether items are x_0 rather than PIL images.
        class_names: The names of the classes; None without classes.
        fingerprint: A hash of the length, the format, and the data set's own `fingerprint` if it has one.
        limits: The smallest and the largest value of the first image; of x_0, all that there may be.
        losses: What the first item holds and its planes do not.
        value_range: What -1 and 1 of x_0 stand for in the model of `init_from`; None: x_0 is in no units of its own.
    """

    dataset: Any
    image_format: ImageFormat
    is_x_0: bool
    class_names: list[str] | None
    fingerprint: str
    limits: tuple[float, float]
    losses: dict[str, int] = field(default_factory=dict)
    name: str = NAME
    license: str | None = None
    num_bad: int = 0
    value_range: ValueRange | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def scale(self) -> Scale:
        """The largest value of a pixel, 255 for x_0, which is in [-1, 1] whatever its units are."""
        return self.max_value

    @property
    def num_images(self) -> int:
        """The number of images, N."""
        return len(self)

    def image(self, i: int) -> np.ndarray:
        """Return the planes of image i, (C, h, w)."""
        return self.read(i)[0]

    def read(self, i: int) -> tuple[np.ndarray, int | None]:
        """Read item i.

        Returns:
            The planes, (C, h, w), and the class; None without classes.

        Raises:
            UsageError: When the item cannot be read, or is not what the first one was.
        """
        try:
            image, label = _parts(self.dataset[i])
        except Exception as error:  # the data set is the user's code
            raise _unreadable(i, error) from error
        if self.class_names is None:
            label = None
        elif label is None or not 0 <= label < len(self.class_names):
            raise UsageError(
                f"item {i} of the data set must have a label in [0, {len(self.class_names)}), got {label}"
            )
        if self.is_x_0:
            return _checked_x_0(image, i, (self.channels, *self.size)), label
        if not isinstance(image, Image.Image):
            raise UsageError(f"item {i} of the data set must be a PIL image as item 0 is, got {type(image).__name__}")
        return _planes(image, f"item {i}", self.image_format), label


def open_given(dataset: Any, config: DataConfig) -> GivenImages:
    """Look at the first item of a data set, and return its images.

    Classes are named by the data set's `classes`, as torchvision's data sets have them.

    Args:
        dataset: The data set.
        config: The settings of the data.

    Raises:
        UsageError: When it is no map-style data set, is empty, or its first item is not an image.
    """
    (image, label), fingerprint = _first_parts(dataset), _own_fingerprint(dataset, config)
    is_x_0, losses = not isinstance(image, Image.Image), {}
    if is_x_0:
        image_format = _format_of_x_0(_checked_x_0(image, 0, None).shape, config)
    else:
        image_format = format_of(image, "item 0", config)
        lost = losses_of(image, image_format)
        image.load()  # which closes its file
        losses = dict.fromkeys(without_opaque(lost, image), 1)
    classes = getattr(dataset, "classes", None)
    if label is not None and classes is None:
        raise UsageError("dataset has labels, and must name its classes: give it the attribute `classes`, a list")
    content = [len(dataset), is_x_0, to_resolution(image_format.size), image_format.channels, image_format.max_value]
    content += [config.center_crop, config.value_range, fingerprint, *["random_crop"] * config.random_crop]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    class_names = None if label is None else [*map(str, classes or ())]
    images = GivenImages(dataset, image_format, is_x_0, class_names, digest, (0, 255), losses)
    if is_x_0:
        return images
    planes = images.image(0)
    return replace(images, limits=(int(planes.min()), int(planes.max())))


def _first_parts(dataset: Any) -> tuple[Any, int | None]:
    """Return the image and the label of the first item."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"dataset must have a length and an item for each index, got {type(dataset).__name__}: a stream has "
            "neither; train on its files with --streaming"
        )
    if len(dataset) == 0:
        raise UsageError("dataset must not be empty, got 0 items")
    try:
        return _parts(dataset[0])
    except Exception as error:  # the data set is the user's code
        raise _unreadable(0, error) from error


def _own_fingerprint(dataset: Any, config: DataConfig) -> str | None:
    """Return the data set's own fingerprint, after a look at settings that would have no effect on it."""
    for name in ARRAY_SETTINGS:
        if getattr(config, name) is not None:
            raise UsageError(f"{name} has no effect on a data set that reads its own items, leave it out")
    for name, default in (("on_bad_image", "raise"), ("max_image_pixels", None)):
        if getattr(config, name) != default:
            raise UsageError(f"{name} has no effect on a data set that reads its own items, leave it out")
    fingerprint = getattr(dataset, "fingerprint", None)
    if not isinstance(fingerprint, str | None):
        raise UsageError(f"fingerprint of the data set must be a text, got {type(fingerprint).__name__}")
    return fingerprint


def _format_of_x_0(shape: tuple[int, ...], config: DataConfig) -> ImageFormat:
    """Return the format of x_0 of this shape, after a comparison with the settings."""
    size = (shape[1], shape[2])
    for name, got in (("channels", shape[0]), ("resolution", to_resolution(size))):
        wanted = getattr(config, name)
        if wanted not in (None, got):
            raise UsageError(f"{name} must be that of the data set's x_0, {got}, got {wanted}: leave it out")
    if config.value_range is not None:
        raise UsageError("value_range must be left out for a data set of x_0, whose values are used as they are")
    if config.random_crop:
        raise UsageError("random_crop must be left out for a data set of x_0, which are used as they are")
    return ImageFormat(config, size, shape[0], 255)


def _planes(image: Image.Image, name: str, image_format: ImageFormat) -> np.ndarray:
    """Decode an image and convert it; the user's own image stays as it is."""
    check_keeps_precision(image, name, image_format.config)
    check_matches_format(image, name, image_format)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # `to_planes` turns an image where it stands
        image = image.copy()
    try:
        return to_planes(image, image_format, name)
    except NeedsSixteenBits:
        raise UsageError(
            f"preserve_input_precision must be off: item 0 has 8 bits, {name} has 16; --no_preserve_input_precision"
        ) from None
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{name} cannot be used: {error}") from error


def _unreadable(i: int, error: Exception) -> UsageError:
    return UsageError(f"item {i} of the data set cannot be read: {in_one_line(error, with_type=True)}")


def _parts(item: Any) -> tuple[Any, int | None]:
    """Return the image of an item, and its label if it has one."""
    if isinstance(item, dict):
        label = item.get("label")
        return item["image"], None if label is None else _class_number(label)
    return item, None


def _class_number(label: Any) -> int:
    try:
        return operator.index(label)
    except TypeError:
        raise UsageError(
            f"label must be the number of a class, got {label!r}: a column of numbers of a `datasets.Dataset` is "
            "label_column"
        ) from None


def _checked_x_0(image: Any, i: int, shape: tuple[int, int, int] | None) -> np.ndarray:
    """Return x_0 as an array, after checking it.

    Args:
        image: What an item holds.
        i: The number of the item.
        shape: The shape that it must have; None for any (C, H, W).
    """
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise UsageError(
            f"item {i} of the data set must be a PIL image or float32 values (C, H, W), got {type(image).__name__}"
        )
    values = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    if values.dtype != np.float32 or values.ndim != 3 or shape not in (None, values.shape):
        wanted = "(C, H, W)" if shape is None else str(shape)
        raise UsageError(f"item {i} of the data set must be float32 {wanted}, got {values.dtype} {values.shape}")
    if not (np.isfinite(values).all() and np.abs(values).max() <= 1):
        raise UsageError(
            f"item {i} of the data set must have values in [-1, 1], got {values.min():g} to {values.max():g}"
        )
    return values
