"""A TrainingConfig from the command line, a YAML file, a recipe and keyword arguments; and back to YAML.

A flag overrides `--config FILE`, which overrides `--recipe NAME`, which overrides the default of the field.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm import recipes
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.runtime.settings import settings_of
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.config import SCHEDULER_SETTINGS, TrainingConfig


def parse_config(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """The command line (default: `sys.argv`) as a checked config; exits with status 2 and a message if it is wrong."""
    parser = _parser(description="Trains a pixel-space diffusion model.")
    parser.add_argument("--config", metavar="FILE", help="A YAML file of these settings, which flags override.")
    parser.add_argument("--recipe", metavar="NAME", help=f"Settings that ship: {', '.join(recipes.names())}.")
    try:
        given = parser.parse_args(arguments)
        names = ("dataset_name", "train_data_dir", "config", "recipe")
        recipe = given.recipe if any(getattr(given, name) is not None for name in names) else "digits"
        settings = _file_settings(recipe, given.config)
        words = [word.partition("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)]
        flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
        # A flag overrides a file's setting that it replaces under another name.
        for flag, replaced in _REPLACES.items():
            # An optimizer that the file names, too, keeps the file's rate.
            is_said = flag in flags and not (flag == "optimizer" and settings.get(flag) == given.optimizer)
            if is_said or (getattr(given, flag) != parser.get_default(flag) and flag != "optimizer"):
                settings = {name: value for name, value in settings.items() if name not in replaced}
        if given.init_from is not None and (beside := sorted(flags & SCHEDULER_SETTINGS.keys())):
            raise UsageError(f"{beside[0]} is that of the model in init_from: leave it out")
        parser.set_defaults(**_as_defaults(settings))
        config, _ = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
        check_config(config)
        return config
    except UsageError as error:
        parser.error(str(error))
        raise


def _parser(**options: Any) -> Any:
    """Make transformers' parser, which hands a field's metadata on to argparse, of fields that hold help alone."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        @staticmethod
        def _parse_dataclass_field(parser: Any, field: Any) -> None:
            plain = copy(field)
            plain.metadata = {"help": field.metadata["setting"].help}
            HfArgumentParser._parse_dataclass_field(parser, plain)

    return Parser(TrainingConfig, allow_abbrev=False, **options)  # pyright: ignore[reportArgumentType]


def load_config(path: str | None = None, recipe: str | None = None, **settings: Any) -> TrainingConfig:
    """A config from a recipe, a YAML file and keyword arguments, each overriding the one named earlier."""
    parser = _parser()
    _check_names(settings, "keyword argument")
    merged = _over(_file_settings(recipe, path), settings)
    parser.set_defaults(**_as_defaults(merged))
    try:
        (config,) = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except SystemExit:
        shown = {name: value for name, value in merged.items() if name != "hub_token"}
        raise UsageError(f"a setting has a value of the wrong type; argparse has named it: {shown}") from None
    return config


def _over(settings: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """With what is named later, in the place of what that replaces under other names."""
    replaced = {
        other
        for name, others in _REPLACES.items()
        if later.get(name) is not None and not (name == "optimizer" and settings.get(name) == later[name])
        for other in others
    }
    return {**{name: value for name, value in settings.items() if name not in replaced}, **later}


# What is named -> what of a recipe or a file before it it stands in for.
_REPLACES = {
    "dataset_name": ("train_data_dir", "dataset_config_name", "image_column"),
    "train_data_dir": ("dataset_name", "dataset_config_name", "image_column"),
    "num_epochs": ("max_train_steps",),
    "init_from": ("model_config_name_or_path", "dropout"),
    "optimizer": ("learning_rate",),
}


def _as_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    # argparse converts and checks defaults that are text as it does flags, but not lists.
    return {
        name: _numbers(name, value) if name in _LISTS else None if value is None else _word(name, value)
        for name, value in settings.items()
    }


def _word(name: str, value: Any) -> str:
    # YAML takes a bare `no` for false.
    return "no" if name == "mixed_precision" and value is False else str(value)


_LISTS = ("ema_halflife_images",)


def _numbers(name: str, value: Any) -> list[float] | None:
    try:
        return None if value is None else [float(v) for v in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number or a list of numbers, got {value!r}") from None


def save_config(config: TrainingConfig, path: Path) -> None:
    """Writes the YAML file that `--config` replays; tokens and what concerns one start only are left out.

    A network that was sized for the data is not in it, but in the run's unet/config.json.
    """
    resume_of = {name: info.resume for name, _, info in settings_of(config)}
    settings = {name: value for name, value in _settings(config).items() if resume_of[name] != "start"}
    write_atomically(path, yaml.safe_dump(settings, sort_keys=False))


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """By name; folders so that they are found from everywhere, and are not taken for Hub ids."""
    settings = {**asdict(config), "learning_rate": config.peak_learning_rate}
    for name in ("dataset_name", "train_data_dir", "init_from"):
        if settings[name] not in (None, "digits") and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def check_same_run(config: TrainingConfig, path: Path) -> None:
    """Raises UsageError if the settings of a resumed run are not those in `path`, its config.yaml."""
    saved = load_config(str(path))
    before = {**asdict(saved), "learning_rate": saved.peak_learning_rate}
    resume_of = {name: info.resume for name, _, info in settings_of(config)}
    for name, value in _settings(config).items():
        has_no_effect = name == "lr_warmup_steps" and config.lr_scheduler == "constant"
        if resume_of[name] == "fixed" and not has_no_effect and value != before[name]:
            raise UsageError(
                f"{name} was {before[name]} in this run, got {value}: resume with --config {path}, "
                "or change that file to change it on purpose"
            )


def _file_settings(recipe: str | None, path: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if recipe is not None:
        if recipe not in recipes.names():
            raise UsageError(f"recipe must be one of {', '.join(recipes.names())}, got {recipe!r}")
        settings |= _read_settings(recipes.settings(recipe), f"recipe {recipe}")
    if path is not None:
        if not Path(path).is_file():
            raise UsageError(f"config must be a YAML file, got {path!r}, which is not there")
        try:
            settings = _over(settings, _read_settings(Path(path).read_text(encoding="utf-8"), path))
        except UnicodeDecodeError as error:
            raise UsageError(f"config must be a YAML file in UTF-8, got {path!r}: {error}") from error
    return settings


def _read_settings(text: str, source: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{source} must hold `name: value` lines, got {type(settings).__name__}")
    _check_names(settings, source)
    return settings


def _check_names(settings: Mapping[str, Any], source: str) -> None:
    known = [f.name for f in fields(TrainingConfig)]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "see --help for the names"
            raise UsageError(f"{source}: unknown setting {name!r}; {remedy}")
