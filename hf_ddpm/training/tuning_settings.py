"""The settings of `hf-ddpm tune`: those of the run that trained the model, and defaults of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_ddpm.data.config import DataConfig, load_data_config
from hf_ddpm.hub.download import find_model
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import read_mapping
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import config_from_flags, file_settings

# The settings by which models are tuned where flags do not say otherwise.
DEFAULTS = {
    "tuned_steps": [1, 2, 4],
    "max_train_steps": 1000,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "lr_warmup_steps": 20,
    "mixed_precision": "auto",
    "compile": "auto",
}
# What the run of the model says beside its data, where it says it.
OF_RUN = (
    *("train_batch_size", "gradient_accumulation_steps", "class_dropout"),
    *("super_resolution", "condition_noise"),
)


def config_of_tuning(
    model: str, steps: Sequence[int] | None, flags: Mapping[str, Any], path: str | None = None
) -> TrainingConfig:
    """Return the checked config of a run that tunes a model.

    Args:
        model: The model, a folder or a Hub id.
        steps: The numbers of sampling steps. None: those of the file, or of DEFAULTS.
        flags: The settings that were given, as text or of their type.
        path: The file of `--config`.

    Raises:
        UsageError: When there is no such model, its data are not known, or a value cannot work.
    """
    folder, _ = find_model(model)
    given = {*flags} if path is None else {*flags, *file_settings(path)}
    place = Path(model).resolve() if Path(model).name in ("", "..") else Path(model)
    place = place if place.is_dir() else Path(place.name)
    weakest = {**DEFAULTS, "output_dir": f"{place}-tuned"}
    names_data = bool(given & {"dataset_name", "train_data_dir"})
    if (folder / "config.yaml").is_file():
        weakest |= _settings_of_run(folder / "config.yaml", with_data=not names_data)
    if not names_data and not {"dataset_name", "train_data_dir"} & weakest.keys():
        raise UsageError(
            f"the data must be known, but {model!r} has no config.yaml of a run that names them: give --dataset_name "
            "or --train_data_dir"
        )
    kept = read_mapping(folder / "scheduler" / "sampler.json").get("guidance")
    if kept and "guidance_scale" not in given:
        raise UsageError(
            f"guidance_scale must be given, as {model!r} keeps guidance of scale {kept.get('scale')}: give that to "
            "make it a part of the tuned model, or 1 for a model that is not guided"
        )
    tuned = {"init_from": model} | ({} if steps is None else {"tuned_steps": sorted(steps)})
    return config_from_flags({**flags, **tuned}, path, weakest=weakest)


def _settings_of_run(path: Path, with_data: bool) -> dict[str, Any]:
    """Return what the config.yaml of a run says of the batch and of what it is made from, and of its data if asked."""
    recorded = read_mapping(path)
    settings = {name: recorded[name] for name in OF_RUN if recorded.get(name) is not None}
    if with_data:
        data = load_data_config(path)
        values = {each.name: getattr(data, each.name) for each in fields(DataConfig)}
        settings |= {name: value for name, value in values.items() if value is not None}
    return settings
