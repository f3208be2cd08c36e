"""The data that a model is measured with.

split        train, test, ...: images of the model's size and channels in 8 bits, or arrays in its range of values,
             each split opened once
fingerprint  identifies the pixels; the fingerprint of a run's own data must be the one that the run recorded
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_ddpm.condition import Condition
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import with_conditions_of_model
from hf_ddpm.data.config import DataConfig, cache_folder, load_data_config
from hf_ddpm.data.images import load_images
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.reference_files import FORMAT as REFERENCE_FORMAT
from hf_ddpm.evaluation.statistics import Reference, check_new_reference, load_reference, write_reference
from hf_ddpm.image_size import to_resolution, to_size
from hf_ddpm.runtime.errors import MissingSplitError, UsageError
from hf_ddpm.runtime.files import read_mapping
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.value_range import ValueRange

# The split of held-out images, if a model's data have one and none is named.
DEFAULT_TEST_SPLIT = "test"


class Splits:
    """The data of a model, as 8-bit images of its size and channels; each split is opened once.

    Attributes:
        data: The settings of the data; None if nobody knows them.
        size: Height and width of the model's images.

    Args:
        processes: The processes that need the data. The main one downloads and decodes it first.
        data: The settings that the user gave. None: those of the run in the model's folder, if there is one.
        folder: The model's folder.
        unet: The config of the model's network.
        channels: The channels of the model's images. None: those that the network takes.
        value_range: The values of a model of arrays; None for other models.
        condition: What the model makes images from; None: from noise alone.
    """

    def __init__(
        self,
        processes: Processes,
        data: DataConfig | None,
        folder: Path,
        unet: Any,
        channels: int | None = None,
        value_range: ValueRange | None = None,
        condition: Condition | None = None,
    ) -> None:
        self._processes, self._stack = processes, ExitStack()
        self._is_given, self._value_range = data is not None, value_range
        self._condition = condition
        self._folder, self._channels = folder, channels or unet.in_channels
        self.size = to_size(unet.sample_size, "sample_size")
        self.data = data
        if (folder / "config.yaml").is_file():
            if data is None:
                recorded = load_data_config(folder / "config.yaml")
                # A run on a data set that was passed to train() names none, and no default is meant.
                self.data = recorded if recorded.dataset_name or recorded.train_data_dir else None
            else:  # the model has seen mirrored images, or parts of images, too
                of_run = read_mapping(folder / "config.yaml")
                crops = bool(of_run.get("random_crop")) and not data.center_crop
                flips = data.random_flip or bool(of_run.get("random_flip"))
                self.data = replace(data, random_flip=flips, random_crop=data.random_crop or crops)
        self._opened: dict[tuple[str, bool], ImageCache] = {}

    def close(self) -> None:
        """Close all splits; their files may be deleted then."""
        self._stack.close()

    @property
    def has_labels(self) -> bool:
        """True if the data have a column of classes."""
        return self.data is not None and self.data.label_column is not None

    @cached_property
    def config(self) -> DataConfig:
        """The settings of the data, for images of the model's size and channels.

        Raises:
            UsageError: When nobody knows the data, they do not fit the model, or they have changed since its training.
        """
        if self.data is None:
            raise UsageError(
                "the data must be known for this, but the model's folder has no config.yaml of a run that names them: "
                "give --dataset_name or, for distances alone, --reference"
            )
        resolution = to_resolution(self.size)
        of_model: dict[str, Any] = {"resolution": resolution, "channels": self._channels}
        if self._is_given and self._value_range is not None:
            of_model["value_range"] = [self._value_range.low, self._value_range.high]
        for name, value in of_model.items():
            if getattr(self.data, name) not in (None, value):
                raise UsageError(f"{name} must be the model's, {value}, got {getattr(self.data, name)}: leave it out")
        precision = self.data.preserve_input_precision
        from_arrays = self._condition is not None and self._condition.value_range is not None
        if self._value_range is None and not (precision and from_arrays):  # conditions may be 16-bit color
            precision = False
        elif self._is_given and self._value_range is not None and self._value_range.dtype == "uint16":
            precision = True  # of 16-bit color, which would be pictures without it
        config = replace(self.data, resolution=resolution, channels=self._channels, preserve_input_precision=precision)
        recorded = read_run(self._folder).get("data", {}).get("fingerprint")
        if not self._is_given and recorded and not config.streaming:
            self._check_fingerprint(self.data, recorded)
        return config

    def _check_fingerprint(self, data: DataConfig, recorded: str) -> None:
        fingerprint = self._processes.main_then_rest(lambda: load_images(data)).fingerprint
        if fingerprint != recorded:
            raise UsageError(
                "the data must be those that the model was trained on, got images with the fingerprint\n"
                f"  {fingerprint} instead of\n  {recorded}: bring them back, or give --dataset_name on purpose"
            )

    def open(self, split: str, option: str = "split", is_labeled: bool = False) -> ImageCache:
        """Return the images of a split, which stay until `close`.

        Args:
            split: train, test, ...
            option: The setting by which the user named the split, for error messages.
            is_labeled: Whether the images have their classes.
        """
        config = self.config if is_labeled else replace(self.config, label_column=None)
        if (split, is_labeled) not in self._opened:
            images = self._processes.main_then_rest(
                lambda: self._stack.enter_context(open_split(config, split, option))
            )
            images = in_range_of_model(images, self._value_range, split)
            images = with_conditions_of_model(images, self._condition, option, split)
            if self._processes.rank == 0 and not any(name == split for name, _ in self._opened):
                for line in describe_split(config, split, images):
                    tqdm.write(line, file=sys.stderr)
            self._opened[split, is_labeled] = images
        return self._opened[split, is_labeled]

    def references(self, network: FeatureNetwork, split: str, test_split: str) -> tuple[Reference, Reference | None]:
        """Return the references of the two splits, from the cache or made now.

        Returns:
            The reference of `split`, and that of `test_split`; None if it is the same split, or DEFAULT_TEST_SPLIT and
            the data do not have it.

        Raises:
            UsageError: When a split that was named is missing, or its images cannot be read.
        """
        if self._value_range is None and self._channels not in (1, 3):
            raise UsageError(f"feature networks take 1 or 3 channels, got a model of {self._channels}")
        self.open(split)
        has_test_split = test_split != split
        if has_test_split:
            try:
                self.open(test_split, "test_split")
            except MissingSplitError:
                if test_split != DEFAULT_TEST_SPLIT:
                    raise
                has_test_split = False
        reference = self._reference(network, split)
        return reference, self._reference(network, test_split) if has_test_split else None

    def _reference(self, network: FeatureNetwork, split: str) -> Reference:
        """Return the reference of a split from the cache; make it if it is missing."""
        config = self.config
        root = cache_folder(config)
        identity = {key: value for key, value in network.identity.items() if key != "information"}
        key = [REFERENCE_FORMAT, split, self.open(split).fingerprint, config.center_crop, identity]
        folder = root / "references" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

        def load_or_make() -> Reference:
            if not folder.is_dir():
                try:
                    check_new_reference(
                        config if self._value_range is None else replace(config, channels=None), folder
                    )
                    write_reference(self.open(split), config, split, network, folder)
                except UsageError:
                    if not folder.is_dir():  # Otherwise another evaluation has made the same one meanwhile.
                        raise
            return load_reference(folder)

        reference = self._processes.main_then_rest(load_or_make)
        # The images are the same, but the data may have had another name when the reference was made.
        data = {
            **reference.metadata["data"],
            "name": find_source(config).name,
            "config": config.dataset_config_name,
        }
        return replace(reference, metadata={**reference.metadata, "data": data})


def in_range_of_model(images: ImageCache, value_range: ValueRange | None, split: str) -> ImageCache:
    """Return images of which -1 and 1 stand for what they do in a model, with the number of values that this clips.

    Args:
        images: The images.
        value_range: The values of a model of arrays; None for other models.
        split: What messages call the images.

    Raises:
        UsageError: When they are of another type than those of the model.
    """
    of_data, of_model = (None if each is None else each.dtype for each in (images.value_range, value_range))
    if of_data != of_model:
        raise UsageError(
            f"the data must be of the model's type, {of_model or 'pictures'}, got {of_data or 'pictures'} in "
            f"{split}: name others{', or read TIFF files as arrays by --channel_axis' * (of_data is None)}"
        )
    return images if value_range is None else images.in_range(value_range)
