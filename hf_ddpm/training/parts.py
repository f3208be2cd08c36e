"""The parts of a run that a user's own code gives to `train`, in place of those that the settings describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import ModelMixin

from hf_ddpm.image_size import to_resolution, to_size
from hf_ddpm.network_config import num_classes_of
from hf_ddpm.runtime.errors import RunError, UsageError, in_one_line
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.config import CLASS_DROPOUT, TrainingConfig

# A part -> the settings that describe it.
_REPLACED = {
    "dataset": (
        *("dataset_name", "train_data_dir", "train_split", "dataset_config_name", "streaming", "eval_steps"),
        *("eval_fraction", "group_column"),
    ),
    "network": (
        "model_config_name_or_path",
        "init_from",
        "dropout",
        "enable_xformers_memory_efficient_attention",
        "augment_probability",
    ),
    "objective": ("loss_weighting", "min_snr_gamma", "tuned_steps"),
}


@dataclass(frozen=True)
class Parts:
    """The arguments of `train` beside the config; see there.

    Args:
        dataset: The images; None for those that the settings name.
        network: The network; None for one that the settings describe.
        objective: The loss; None for that of the settings.
        callbacks: What is called as the run goes on.
    """

    dataset: Any = None
    network: Any = None
    objective: Callable[..., torch.Tensor] | None = None
    callbacks: Sequence[Callable[[Event, Any], None]] = ()


@dataclass(frozen=True)
class Event:
    """An event: something that a run has just done.

    Args:
        name: `log` after a line of metrics.jsonl, `preview`, `checkpoint`, or `end` when the model is whole.
        step: The optimizer steps done.
        images: The images seen.
        values: The line of metrics.jsonl for `log`; else `path`, the file or folder that was written.
    """

    name: str
    step: int
    images: int
    values: dict[str, Any]


def check_parts(config: TrainingConfig, parts: Parts) -> None:
    """Check that no setting describes a part that was passed.

    Raises:
        UsageError: When one does, or a part cannot be what it is for.
    """
    for part, names in _REPLACED.items():
        defaults = {each.name: each.default for each in fields(config)}
        given = [name for name in names if getattr(config, name) != defaults[name]]
        if getattr(parts, part) is not None and given:
            raise UsageError(f"{given[0]} must be left out with {part}=, got {getattr(config, given[0])!r}")
    if parts.network is not None and not isinstance(parts.network, ModelMixin):
        kind = type(parts.network).__name__
        raise UsageError(f"network must be a ModelMixin of diffusers, which can be saved and loaded, got {kind}")
    if parts.dataset is None and config.label_column is None and config.class_dropout not in (0, CLASS_DROPOUT):
        raise UsageError(f"class_dropout = {config.class_dropout} has no effect without classes: give label_column")
    if callable(parts.callbacks):
        raise UsageError("callbacks must be a list of functions, got one function: put it into a list")
    for part in (parts.objective, *parts.callbacks):
        if part is not None and not callable(part):
            raise UsageError(f"objective and callbacks must be functions, got {type(part).__name__}")


def check_given_network(network: Any, config: TrainingConfig, images: Any, condition_channels: int = 0) -> None:
    """Check that a network that was passed takes the images, by one forward pass of two of them.

    Args:
        network: The network.
        config: The settings of the run.
        images: The images.
        condition_channels: The channels that it takes after those of the images.

    Raises:
        UsageError: When its config or its output do not fit.
    """
    size, wanted = network.config.get("sample_size"), to_resolution(images.size)
    if size is None or to_resolution(to_size(size, "sample_size in the network's config")) != wanted:
        raise UsageError(f"sample_size in the network's config must be the resolution, {wanted}, got {size}")
    in_channels = images.channels + condition_channels
    if network.config.get("in_channels") != in_channels:
        got, owner = network.config.get("in_channels"), "the images" + (condition_channels > 0) * " and conditions"
        raise UsageError(f"in_channels in the network's config must be those of {owner}, {in_channels}, got {got}")
    num_classes = num_classes_of(network.config)
    if (num_classes is None) != (images.num_classes is None) or (num_classes or 0) < (images.num_classes or 0):
        raise UsageError(f"the network must take the classes of the images, {images.num_classes}, got {num_classes}")
    if frozen := [name for name, parameter in network.named_parameters() if not parameter.requires_grad]:
        raise UsageError(f"the network must train all of its parameters, got {frozen[0]!r} without gradient")
    channels = images.channels * (2 if config.variance_type == "learned_range" else 1)
    x_t, t = torch.zeros(2, in_channels, *images.size), torch.zeros(2, dtype=torch.int64)
    conditions = {} if num_classes is None else {"class_labels": t.to(network.device)}
    mode = network.training
    network.eval()  # running statistics of a network in training would take the zeros for images
    try:
        with torch.no_grad():
            shape = tuple(network(x_t.to(network.device), t.to(network.device), **conditions).sample.shape)
    except Exception as error:  # the network is the user's code
        raise UsageError(f"the network must take x_t and t, got {in_one_line(error, with_type=True)}") from error
    finally:
        network.train(mode)
    if shape != (2, channels, *images.size):
        raise UsageError(f"the network must give {(2, channels, *images.size)} for two images, got {shape}")


def call_callbacks(callbacks: Sequence[Any], processes: Processes, run: Any, events: Sequence[Event]) -> None:
    """Call the callbacks with events, on the main process, or on all where one has `on_all_processes = True`.

    Raises:
        RunError: On all processes, when a callback fails on one of them.
    """
    if not callbacks or not events:
        return
    failures: list[BaseException] = []

    def call() -> str | None:
        for event in events:
            for callback in callbacks:
                if processes.rank != 0 and not getattr(callback, "on_all_processes", False):
                    continue
                try:
                    callback(event, run)
                except (Exception, SystemExit) as error:  # it is the user's code
                    failures.append(error)
                    name = getattr(callback, "__name__", type(callback).__name__)
                    return f"{name} failed at {event.name} of step {event.step}: {in_one_line(error, with_type=True)}"
        return None

    texts = [text for text in processes.gather(call) if text]
    if texts:
        raise RunError(f"a callback failed: {texts[0]}") from (failures[0] if failures else None)
