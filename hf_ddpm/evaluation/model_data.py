"""The data that a model is measured with.

split        train, test, ...: images of the model's size and channels in 8 bits, each opened once
fingerprint  of the pixels; that of a run's own data must be what the run recorded
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub

from hf_ddpm.data.cache import ImageCache, load_images
from hf_ddpm.data.config import DataConfig, load_data_config
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.splits import open_split
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.statistics import FORMAT as REFERENCE_FORMAT
from hf_ddpm.evaluation.statistics import Reference, load_reference, make_reference
from hf_ddpm.hub.card import read_run
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import read_mapping
from hf_ddpm.runtime.processes import Processes


class Splits:
    """The data of a model, as 8-bit images of its size and channels; each split is opened once."""

    def __init__(
        self, processes: Processes, stack: ExitStack, data: DataConfig | None, folder: Path, unet: Any
    ) -> None:
        self._processes, self._stack, self._given = processes, stack, data is not None
        self._folder, self._size, self._channels = folder, unet.sample_size, unet.in_channels
        self.data = data
        if (folder / "config.yaml").is_file():
            if data is None:
                self.data = load_data_config(folder / "config.yaml")
            elif read_mapping(folder / "config.yaml").get("random_flip"):  # the model has seen mirrored images, too
                self.data = replace(data, random_flip=True)
        self._opened: dict[tuple[str, bool], ImageCache] = {}

    @property
    def resolution(self) -> int:
        height, width = (self._size, self._size) if isinstance(self._size, int) else self._size
        if height != width:
            raise UsageError(f"data can be compared with square images only, got {width} x {height}")
        return height

    @property
    def has_labels(self) -> bool:
        return self.data is not None and self.data.label_column is not None

    @cached_property
    def config(self) -> DataConfig:
        """The settings, for images of the model's size and channels."""
        if self.data is None:
            raise UsageError(
                "the data must be known for this, but the model's folder has no config.yaml of a run: "
                "give --dataset_name or, for distances alone, --reference"
            )
        for name, value in (("resolution", self.resolution), ("channels", self._channels)):
            if getattr(self.data, name) not in (None, value):
                raise UsageError(f"{name} must be the model's, {value}, got {getattr(self.data, name)}: leave it out")
        config = replace(
            self.data, resolution=self.resolution, channels=self._channels, preserve_input_precision=False
        )
        recorded = read_run(self._folder).get("data", {}).get("fingerprint")
        if not self._given and recorded and not config.streaming:
            found = self._processes.main_then_rest(lambda: load_images(self.data or config)).fingerprint
            if found != recorded:
                raise UsageError(
                    "the data must be those that the model was trained on, got images with the fingerprint\n"
                    f"  {found} instead of\n  {recorded}: bring them back, or give --dataset_name on purpose"
                )
        return config

    def open(self, split: str, option: str = "split", is_labeled: bool = False) -> ImageCache:
        """The images of a split, which `option` named; they stay until the end."""
        config = self.config if is_labeled else replace(self.config, label_column=None)
        if (split, is_labeled) not in self._opened:
            self._opened[split, is_labeled] = self._processes.main_then_rest(
                lambda: self._stack.enter_context(open_split(config, split, option))
            )
        return self._opened[split, is_labeled]

    def references(self, network: FeatureNetwork, split: str, test_split: str) -> tuple[Reference, Reference | None]:
        """That of `split`, and that of `test_split` if there is one; kept in the cache, and made if need be."""
        if self._channels not in (1, 3):
            raise UsageError(f"feature networks take 1 or 3 channels, got a model of {self._channels}")
        self.open(split)
        names = [split]
        if test_split != split:
            with suppress(UsageError):
                self.open(test_split)
                names.append(test_split)
        root = Path(self.config.cache_dir or huggingface_hub.constants.HF_HOME).expanduser() / "hf_ddpm"
        identity = {key: value for key, value in network.identity.items() if key != "information"}
        source, found = find_source(self.config).name, list[Reference]()
        for name in names:
            images = self.open(name)
            decisive = [REFERENCE_FORMAT, name, images.fingerprint, self.config.center_crop, identity]
            folder = root / "references" / hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

            def find(name: str = name, folder: Path = folder) -> Reference:
                if not folder.is_dir():
                    make_reference(self.config, name, network, folder)
                reference = load_reference(folder)  # of these images, by whatever name they had when it was made
                data = {**reference.metadata["data"], "name": source, "config": self.config.dataset_config_name}
                return replace(reference, metadata={**reference.metadata, "data": data})

            found.append(self._processes.main_then_rest(find))
        return found[0], found[1] if len(found) > 1 else None
