"""The output of `hf-ddpm info`: the versions of this machine for a bug report, or a model as its files tell it."""

from __future__ import annotations

import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_ddpm._version import __version__
from hf_ddpm.classes import Classes, read_classes
from hf_ddpm.condition import describe_condition, read_condition
from hf_ddpm.labels import describe_labels, read_labels
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, network_folder, read_mapping
from hf_ddpm.runtime.run_files import checkpoint_names, read_evaluation, read_run
from hf_ddpm.value_range import read_value_range

PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "transformers", "huggingface_hub", "safetensors", "numpy")


def machine_info() -> dict[str, Any]:
    """Return versions, operating system and devices, by name."""
    import torch

    from hf_ddpm.runtime.devices import device_name

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not devices and torch.backends.mps.is_available():
        devices = [torch.device("mps")]
    return {
        "hf_ddpm": __version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "CUDA": torch.version.cuda or "none",
        "devices": [device_name(device) for device in [torch.device("cpu"), *devices]],
    }


def model_info(model: str) -> dict[str, Any]:
    """Return what a model is, how far it was trained and what was measured; a value is None if no file says it.

    Args:
        model: A folder that holds a pipeline, which is read without torch, or a Hub id, which is downloaded.

    Raises:
        UsageError: When there is no such model, or one of its files is damaged.
    """
    folder = look_at("model", model)
    if not (folder / "model_index.json").is_file():
        from hf_ddpm.hub.download import find_model

        folder, _ = find_model(model)
    network = network_folder(folder)
    unet, scheduler = map(_read_json, (network / "config.json", folder / "scheduler/scheduler_config.json"))
    condition = read_condition(folder)
    progress, values = _progress(folder), read_value_range(folder)
    return {
        "model": model,
        "size": unet.get("sample_size"),
        "channels": unet.get("in_channels") if condition is None else unet["in_channels"] - condition.channels,
        "made_from": None if condition is None else describe_condition(condition),
        "classes": _classes(folder, unet),
        "labels": _labels(folder),
        "values": None if values is None else str(values),
        "parameters": _num_parameters(network),
        "prediction_type": scheduler.get("prediction_type"),
        "schedule": scheduler.get("beta_schedule"),
        "num_train_timesteps": scheduler.get("num_train_timesteps"),
        "is_finished": progress.get("is_finished"),
        "steps_trained": progress.get("steps", progress.get("step")),
        "images_seen": progress.get("images"),
        "measured": read_evaluation(folder),
    }


def _classes(folder: Path, unet: dict[str, Any]) -> list[str] | int | None:
    """Return the names of the classes if the model keeps them, else their number."""
    classes = read_classes(folder)
    if unet.get("class_embed_type") is not None:
        return None
    return unet.get("num_class_embeds") or unet.get("num_embeds_ada_norm") if classes is None else [*classes.names]


def _labels(folder: Path) -> str | None:
    """Return in words which numbers, or which columns of labels, the model is conditioned on."""
    labels = read_labels(folder)
    return None if labels is None or isinstance(labels, Classes) else describe_labels(labels)


def _progress(folder: Path) -> dict[str, Any]:
    """Return how far the run in `folder` has come: its own record if there is one, else its last checkpoint."""
    if training := read_run(folder).get("training"):
        return training
    checkpoints = checkpoint_names(folder)
    path = folder / checkpoints[-1] / "progress.json" if checkpoints else None
    return _read_json(path) if path is not None and path.is_file() else {}


def _num_parameters(folder: Path) -> int | None:
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UsageError(
                f"{path} must be whole, got a damaged file ({error}): download or save it again"
            ) from error
    return count or None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path} must be a JSON file of a diffusers pipeline, got no such file")
    return read_mapping(path, "download or save the model again")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
