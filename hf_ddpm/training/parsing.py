"""A TrainingConfig from a command line, a YAML file and a recipe; and back to YAML.

A setting has the value of its flag or keyword argument; else that of the file of `--config`; else that of the
`--recipe`; else the default of its field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm import recipes
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, parse_mapping, write_atomically
from hf_ddpm.runtime.settings import did_you_mean, require_choice, settings_of, typed_values, with_plain_paths
from hf_ddpm.training.checks import check_config, is_resumed
from hf_ddpm.training.config import DEFAULT_BATCH_SIZE, SCHEDULER_SETTINGS, TrainingConfig

# A setting -> the settings of a file or recipe that no longer apply when it is given.
REPLACED_SETTINGS = {
    "dataset_name": ("train_data_dir", "dataset_config_name", "image_column"),
    "train_data_dir": ("dataset_name", "dataset_config_name", "image_column"),
    "num_epochs": ("max_train_steps",),
    "init_from": ("model_config_name_or_path", "dropout"),
    "optimizer": ("learning_rate",),
    "train_batch_size": ("global_batch_size",),
}


def config_from_flags(
    flags: Mapping[str, Any],
    path: str | None = None,
    recipe: str | None = None,
    weakest: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """Return the checked config that a command line asks for.

    Args:
        flags: The settings that were given, as text or of their type.
        path: The file of `--config`.
        recipe: The name of `--recipe`; `digits` if neither data nor a file or recipe are named.
        weakest: Settings that count where none of these names one, in the place of a recipe.

    Raises:
        UsageError: When a name is unknown, or a value cannot work or take effect beside the others.
    """
    if path is None and recipe is None and weakest is None and not flags.keys() & {"dataset_name", "train_data_dir"}:
        recipe = "digits"
    config = _config_of_layers([weakest or {}, *_layers(path, recipe), typed_values(TrainingConfig, flags)])
    conflicting = sorted(flags.keys() & SCHEDULER_SETTINGS.keys())
    if config.init_from is not None and conflicting:
        raise UsageError(f"{conflicting[0]} is that of the model in init_from: leave it out")
    check_config(config)
    return config


def load_config(path: str | None = None, recipe: str | None = None, **settings: Any) -> TrainingConfig:
    """Return a config from keyword arguments, a YAML file and a recipe, of which the first are the strongest.

    Where `train_batch_size` is auto, a step of a new run has the images that weaker settings give it.

    Raises:
        UsageError: When a name is unknown, or a value has another type than its setting. Ranges and relations are
            checked when the run starts.
    """
    _check_names(settings, "keyword argument")
    return _config_of_layers([*_layers(path, recipe), typed_values(TrainingConfig, settings)])


def _layers(path: str | None, recipe: str | None) -> list[Mapping[str, Any]]:
    """Return the settings of a recipe and of a file, the weaker first."""
    layers: list[Mapping[str, Any]] = [] if recipe is None else [_recipe_settings(recipe)]
    return layers if path is None else [*layers, file_settings(path)]


def _config_of_layers(layers: Sequence[Mapping[str, Any]]) -> TrainingConfig:
    """Return the config of settings from several places, the strongest last."""
    loaded: dict[str, Any] = {}
    images_of_step = None
    for layer in layers:
        if layer.get("train_batch_size") == "auto":
            images_of_step = _images_of_step(loaded) if loaded else None
        loaded = override(loaded, layer)
    config = with_plain_paths(TrainingConfig(**loaded), TrainingConfig)
    if config.train_batch_size == "auto" and config.global_batch_size is None and not is_resumed(config):
        config = replace(config, global_batch_size=images_of_step)
    return config


def override(settings: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with the values of `stronger`, and without what those replace under other names."""
    dropped = {"gradient_accumulation_steps"} if stronger.get("train_batch_size") == "auto" else set()
    for name, replaced in REPLACED_SETTINGS.items():
        # The optimizer that the weaker settings name, too, keeps its learning rate.
        is_same_optimizer = name == "optimizer" and settings.get(name) == stronger.get(name)
        if stronger.get(name) is not None and not is_same_optimizer:
            dropped.update(replaced)
    return {**{name: value for name, value in settings.items() if name not in dropped}, **stronger}


def _images_of_step(settings: Mapping[str, Any]) -> int | None:
    """Return the images that settings give a step of one process; None if they leave that open."""
    batch_size = settings.get("train_batch_size", DEFAULT_BATCH_SIZE)
    if batch_size == "auto":
        return settings.get("global_batch_size")
    return None if batch_size is None else batch_size * (settings.get("gradient_accumulation_steps") or 1)


def save_config(config: TrainingConfig, path: Path) -> None:
    """Write the YAML file that `--config` replays.

    Tokens and what belongs to one start of a run are left out. A network that was sized for the data is not in it, but
    in the run's unet/config.json.
    """
    write_atomically(path, yaml.safe_dump(settings_to_save(config), sort_keys=False))


def settings_to_save(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings by name, without tokens and what belongs to one start of a run."""
    resume_of = {name: info.resume for name, _, info in settings_of(config)}
    return {name: value for name, value in _saved_settings(config).items() if resume_of[name] != "start"}


def check_same_run(config: TrainingConfig, path: Path) -> None:
    """Check that a resumed run has the settings of the run.

    Args:
        config: The settings of the resumed run.
        path: The config.yaml of the run.

    Raises:
        UsageError: When a setting that decides what the model becomes is another one.
    """
    remedy = f"resume with --config {path}, or change that file to change it on purpose"
    require_same_settings(config, load_config(str(path)), remedy)


def require_same_settings(config: TrainingConfig, saved: TrainingConfig, remedy: str) -> None:
    """Check that a resumed run has the settings that were saved of it.

    Raises:
        UsageError: When a setting that decides what the model becomes is another one; the message ends with `remedy`.
    """
    before = {**asdict(saved), "learning_rate": saved.peak_learning_rate}
    resume_of = {name: info.resume for name, _, info in settings_of(config)}
    for name, value in _saved_settings(config).items():
        has_no_effect = name == "lr_warmup_steps" and config.lr_scheduler == "constant"
        has_no_effect |= name in ("resolution", "channels") and value is None  # before the images decide it
        if resume_of[name] == "fixed" and not has_no_effect and value != before[name]:
            raise UsageError(f"{name} was {before[name]} in this run, got {value}: {remedy}")


def _saved_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return all settings by name, with folders as absolute paths, which are not taken for Hub ids."""
    settings = {**asdict(config), "learning_rate": config.peak_learning_rate}
    for name in ("dataset_name", "train_data_dir", "init_from"):
        if settings[name] not in (None, "digits") and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def _recipe_settings(recipe: str) -> dict[str, Any]:
    require_choice("recipe", recipe, recipes.names())
    return settings_in(recipes.settings(recipe), f"recipe {recipe}")


def file_settings(path: str) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        UsageError: When it is not there, is damaged or holds none.
    """
    file = look_at("config", path)
    if not file.is_file():
        raise UsageError(f"config must be a YAML file, got {path!r}, which is not there")
    settings = settings_in(file.read_bytes(), path)
    if not settings:
        raise UsageError(f"config must hold settings, got {path!r}, which holds none: write `name: value` lines")
    return settings


def settings_in(content: bytes | str, source: str) -> dict[str, Any]:
    """Return the settings in the content of a YAML file, each of its type.

    Args:
        content: The content.
        source: The file's name, for error messages.

    Raises:
        UsageError: When the content is damaged, names an unknown setting, or gives one a value of another type.
    """
    settings = parse_mapping(content, source, "write a line `name: value` for each setting")
    _check_names(settings, source)
    if "hub_token" in settings:
        raise UsageError(
            f"hub_token must not stand in a file, which others may read, but does in {source}: delete that line, and "
            "use hf auth login, or HF_TOKEN in the environment"
        )
    return typed_values(TrainingConfig, settings, source)


def _check_names(settings: Mapping[str, Any], source: str) -> None:
    """Check that all settings exist.

    Raises:
        UsageError: When one does not; the message says which name is close to it.
    """
    names = [each.name for each in fields(TrainingConfig)]
    for name in settings:
        if name not in names:
            remedy = did_you_mean(str(name), names) or "; see --help for the names"
            raise UsageError(f"{source}: unknown setting {name!r}{remedy}")
