"""The records of a run, from whose files the card is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_ddpm.classes import Classes, numbered_classes, read_classes
from hf_ddpm.condition import Condition, read_condition
from hf_ddpm.hub.download import is_hub_id
from hf_ddpm.labels import Columns, Values, read_labels
from hf_ddpm.runtime.files import network_folder, read_mapping, read_metrics
from hf_ddpm.runtime.run_files import read_evaluation, read_run


@dataclass(frozen=True)
class RunRecords:
    """The contents of the files in a run's folder; a file that the run did not write has none."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings of config.yaml."""
        return read_mapping(self.folder / "config.yaml")

    @cached_property
    def average(self) -> dict[str, Any]:
        """The facts of average.json, of an average that `hf-ddpm average` wrote."""
        return read_mapping(self.folder / "average.json")

    @cached_property
    def unet(self) -> dict[str, Any]:
        """The config of the network."""
        return read_mapping(network_folder(self.folder) / "config.json")

    @cached_property
    def condition(self) -> Condition | None:
        """The image that the model makes images from; None: from noise alone."""
        return read_condition(self.folder)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts of run.json, without those of the training if the weights are an average of an earlier step."""
        facts = read_run(self.folder)
        if self.average.get("images") not in (None, (facts.get("training") or {}).get("images")):
            return {**facts, "training": {}}
        return facts

    @property
    def data(self) -> dict[str, Any]:
        """The facts of the data in run.json."""
        return self.facts.get("data") or {}

    @property
    def training(self) -> dict[str, Any]:
        """The facts of the training in run.json."""
        return self.facts.get("training") or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a step."""
        return [line for line in read_metrics(self.folder / "metrics.jsonl") if line.get("step") is not None]

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """The results of evaluation.json."""
        return read_evaluation(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the run and of its saved model, by the names of diffusers; None for what is not recorded."""
        config = self.config
        settings = {
            "num_train_timesteps": config.get("ddpm_num_steps"),
            **{name: config.get(f"ddpm_{name}") for name in ("beta_schedule", "beta_start", "beta_end")},
            **config,
            **read_mapping(self.folder / "scheduler/scheduler_config.json"),
            **self.training,
            "ema_std": self.average.get("std"),
        }
        if "halflife_images" in self.average:
            settings["ema_halflife_images"] = [self.average["halflife_images"]]
        # A network that was configured by a file has its own dropout.
        default_dropout = None if config.get("model_config_name_or_path") else config.get("dropout")
        settings["dropout"] = self.unet.get("dropout", default_dropout)
        return settings

    @property
    def base_model(self) -> str | None:
        """The model on the Hub with whose weights the training began."""
        name = self.config.get("init_from")
        return name if name is not None and is_hub_id(name) else None

    @cached_property
    def classes(self) -> Classes | None:
        """The classes of the model, with names if it keeps any."""
        count = self.unet.get("num_class_embeds") or self.unet.get("num_embeds_ada_norm")
        if self.unet.get("class_embed_type") is not None or count is None:
            return None
        return read_classes(self.folder) or numbered_classes(count)

    @cached_property
    def labels(self) -> Values | Columns | None:
        """The labels of the model that are not one column of classes."""
        labels = read_labels(self.folder)
        return None if isinstance(labels, Classes) else labels

    @property
    def is_conditional(self) -> bool:
        """True if the network takes labels."""
        names = ("num_class_embeds", "class_embed_type", "num_embeds_ada_norm")
        return any(self.unet.get(name) is not None for name in names)
