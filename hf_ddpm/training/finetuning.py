"""A run that begins with the weights of another model (`init_from`).

The run keeps that model's network, prediction type, variance and noise schedule, which its weights were trained for.
Size and channels of the images are the model's, too, and so are the units of a model of arrays.

A model that makes images from noise alone may become one that makes them from images. Its first convolution then takes
the channels of the conditions, too, by weights that begin at zero, so that the model begins as it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from diffusers import UNet2DModel

from hf_ddpm.condition import CONDITIONAL_NETWORK, is_conditional, read_condition
from hf_ddpm.consistency import check_tunable
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.hub.download import find_model
from hf_ddpm.image_size import to_resolution, to_size
from hf_ddpm.label_embedding import PREFIX, begin_at_zero
from hf_ddpm.labels import read_labels
from hf_ddpm.network import load_unet, naming_weights
from hf_ddpm.network_config import num_classes_of
from hf_ddpm.pipeline import GUIDE_FOLDER
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import network_folder, read_mapping
from hf_ddpm.runtime.run_files import MODEL_INDEX
from hf_ddpm.scheduler import LEARNED_VARIANCES, as_our_scheduler, is_tuned
from hf_ddpm.training.checks import check_config, is_resumed
from hf_ddpm.training.config import SCHEDULER_SETTINGS, TrainingConfig
from hf_ddpm.training.parsing import load_config
from hf_ddpm.value_range import ValueRange, read_value_range

FIRST_CONVOLUTION = "conv_in.weight"


def take_over(config: TrainingConfig) -> TrainingConfig:
    """Return the config with what the model of `init_from` decides; a resumed run has it in its config.yaml.

    Raises:
        UsageError: There is no such model, this package cannot train it, or a setting contradicts it.
    """
    model = config.init_from
    if model is None:
        return config
    if is_resumed(config):
        saved_config = load_config(str(Path(config.output_dir) / "config.yaml"))
        decided = {name: getattr(saved_config, name) for name in (*SCHEDULER_SETTINGS, "resolution", "channels")}
    else:
        _check_kind(config, model)
        decided = _settings_of(model)
    default = TrainingConfig()
    for name, value in decided.items():
        requested = getattr(config, name)
        if requested != getattr(default, name) and requested != value:
            raise UsageError(f"{name} must be {value}, that of the model {model!r}, got {requested}")
    config = replace(config, **decided)
    check_config(config)
    if config.tuned_steps is not None:
        _check_tuning(config, model, max(config.tuned_steps))
    return config


def range_to_keep(config: TrainingConfig) -> ValueRange | None:
    """Return the value range that a run has from the model of `init_from`, so that its units stay; None: its own.

    A resumed run goes on with that of its own model.
    """
    if config.init_from is None or config.value_range is not None or config.value_quantiles is not None:
        return None
    return read_value_range(_model_to_keep(config, config.init_from))


def condition_range_to_keep(config: TrainingConfig) -> ValueRange | None:
    """Return the value range that conditions have from the model of `init_from`; see `range_to_keep`."""
    if config.init_from is None or config.condition_column is None or config.value_quantiles is not None:
        return None
    condition = read_condition(_model_to_keep(config, config.init_from))
    return None if condition is None else condition.value_range


def _model_to_keep(config: TrainingConfig, init_from: str) -> Path:
    """Return the folder of the model whose units a run keeps: its own if it is resumed, and has saved one."""
    folder = Path(config.output_dir)
    return folder if is_resumed(config) and (folder / MODEL_INDEX).is_file() else find_model(init_from)[0]


def require_type(values: ValueRange, dtype: str | None, condition_column: str | None = None) -> None:
    """Check that data are of a type that can have the units of a model.

    Args:
        values: The values of the model, or of its conditions.
        dtype: The type of arrays; None for images.
        condition_column: The column of the arrays if they are conditions.

    Raises:
        UsageError: When they are not.
    """
    if dtype is not None and replace(values, dtype=dtype).is_integer == values.is_integer:
        limits = np.iinfo(dtype) if values.is_integer else np.finfo(dtype)
        if limits.min <= values.low and values.high <= limits.max:
            return
    what, other = "the data must be of a type that holds the values", ", or give --value_range LOW HIGH for their own"
    if condition_column is not None:
        what = f"condition_column {condition_column!r} must be of a type that holds the values of the conditions"
        other = ", or give --value_quantiles 0 1, by which conditions and images have ranges of their own"
        other = "" if dtype is None else other
    raise UsageError(
        f"{what} of the model in init_from, {values}, so that its units stay, got {dtype or 'images'}: convert them "
        f"to {values.dtype}{other}"
    )


def with_range(images: Any, values: ValueRange) -> Any:
    """Return images of which -1 and 1 stand for what they do in a model: arrays, or x_0 of the user's code."""
    if images.value_range is None:
        return replace(images, value_range=values, limits=(values.low, values.high))
    values = replace(images.value_range, low=values.low, high=values.high)
    return images.in_range(values) if isinstance(images, ImageCache) else replace(images, value_range=values)


def with_range_of_conditions(images: Any, values: ValueRange) -> Any:
    """Return images of whose conditions, arrays of a type for it, -1 and 1 stand for what they do in a model."""
    return replace(images, conditions=with_range(images.conditions, values))


def load_weights(unet: UNet2DModel, network: Path, source: str) -> None:
    """Load the weights in the folder `network` into a network of the same shape.

    The labels and conditions of a model that has had none begin at zero: its first predictions are those of the model
    without them.

    Raises:
        UsageError: They are not whole, or not finite.
    """
    weights = load_unet(network, source).state_dict()
    if unet.class_embedding is not None and not any(name.startswith(PREFIX) for name in weights):
        weights |= begin_at_zero(unet)
    first, wanted = weights[FIRST_CONVOLUTION], unet.conv_in.weight
    if first.shape[1] < wanted.shape[1]:
        widened = torch.zeros_like(wanted, device=first.device, requires_grad=False)
        widened[:, : first.shape[1]] = first
        weights[FIRST_CONVOLUTION] = widened
    unet.load_state_dict(weights)


def network_of(model: str) -> Path:
    """Return the folder of a model's network, with config.json and weights."""
    folder, _ = find_model(model)
    network = network_folder(folder)
    return network if network.is_dir() else folder


def is_conditional_network(network: Path) -> bool:
    """Return whether the network in a folder, as of `network_of`, takes conditions."""
    return network.name == CONDITIONAL_NETWORK


def _check_tuning(config: TrainingConfig, model: str, most_steps: int) -> None:
    """Check that a model can be tuned for few steps as the settings say.

    Raises:
        UsageError: When it cannot.
    """
    check_tunable(config.prediction_type, config.variance_type, config.ddpm_beta_schedule)
    if most_steps > config.ddpm_num_steps:
        raise UsageError(
            f"tuned_steps must be in [1, {config.ddpm_num_steps}], got {most_steps}: the model {model!r} has "
            f"{config.ddpm_num_steps} timesteps"
        )
    if config.label_column is not None:
        require_place_for_labels(model)
    if config.is_guided:
        _check_guidable(model)


def require_place_for_labels(model: str) -> None:
    """Check that a model that is tuned on images with labels takes some: it teaches what it knows.

    Raises:
        UsageError: When it was trained without labels.
    """
    network = read_mapping(network_of(model) / "config.json")
    if num_classes_of(network) is None and network.get("class_embed_type") is None:
        raise UsageError(
            f"images must have no labels where a model without labels is tuned, got {model!r}: leave label_column "
            "out, or first train the model on with labels"
        )


def _check_guidable(model: str) -> None:
    """Check that a model has something that its guidance leads away from.

    Raises:
        UsageError: When it was trained without hidden labels, and keeps no weaker network.
    """
    folder, _ = find_model(model)
    labels = read_labels(folder)
    is_known = labels is not None or num_classes_of(read_mapping(network_of(model) / "config.json")) is None
    if is_known and not (labels is not None and labels.has_unconditional) and not (folder / GUIDE_FOLDER).is_dir():
        raise no_weaker_error(model)


def no_weaker_error(model: str) -> UsageError:
    """Return the error of a model that is to be guided, and has nothing to be guided by."""
    return UsageError(
        "guidance_scale needs a model with labels that was trained with class_dropout, or one with a weaker network "
        f"in its folder {GUIDE_FOLDER!r}, got {model!r} with neither: leave it out"
    )


def _check_kind(config: TrainingConfig, model: str) -> None:
    """Check that a run makes images from images if its model does.

    Raises:
        UsageError: When the run makes them from noise alone.
    """
    if not config.makes_from_images and is_conditional(find_model(model)[0]):
        raise UsageError(
            f"init_from needs a model that makes images from noise alone, got {model!r}, which makes them from "
            "images: give super_resolution or condition_column"
        )


def _settings_of(model: str) -> dict[str, Any]:
    """Return the settings that a model decides, by their names in TrainingConfig."""
    folder, _ = find_model(model)
    subfolder = "scheduler" if (folder / "scheduler").is_dir() else ""
    stored: Any = read_mapping(folder / subfolder / "scheduler_config.json")
    if "beta_schedule" not in stored or stored.get("trained_betas") is not None:
        raise UsageError(
            f"init_from needs a model with a noise schedule by name, got {model!r} with "
            f"{stored.get('_class_name')} and {'betas of its own' if 'beta_schedule' in stored else 'none'}"
        )
    if is_tuned(stored):
        raise UsageError(
            f"init_from must be a model that was not tuned for few steps, got {model!r}, which was: take the model "
            "that it began as"
        )
    hints = get_type_hints(TrainingConfig)
    for ours, theirs in SCHEDULER_SETTINGS.items():
        choices = [choice for choice in get_args(hints[ours]) if isinstance(choice, str)]
        if choices and (stored.get(theirs) or choices[0]) not in choices:
            raise UsageError(
                f"init_from needs a model whose {theirs} is one of {', '.join(choices)}, got {stored[theirs]!r}"
            )
    with naming_weights(f"init_from {model!r}"):
        scheduler = as_our_scheduler(stored)
    known = {ours: scheduler.config[theirs] for ours, theirs in SCHEDULER_SETTINGS.items()}
    if known["ddpm_beta_schedule"] == "squaredcos_cap_v2":  # which has no ends to choose
        del known["ddpm_beta_start"], known["ddpm_beta_end"]
    network = read_mapping(network_of(model) / "config.json")
    size, channels = network.get("sample_size"), network.get("in_channels", 3)
    if is_conditional(folder):
        outputs = 2 if known["variance_type"] in LEARNED_VARIANCES else 1
        channels = network.get("out_channels", 3) // outputs
    resolution = to_resolution(to_size(size, f"sample_size of init_from {model!r}"))
    return {**known, "resolution": resolution, "channels": channels}
