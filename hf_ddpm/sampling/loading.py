"""A pipeline of a model that is ready to sample: its scheduler, its guidance, the arithmetic of its network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_ddpm.condition import is_conditional
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.guidance import Guidance, changed
from hf_ddpm.hub.download import find_model
from hf_ddpm.names import DTYPES, SCHEDULERS
from hf_ddpm.network import compile_network, load_unet, naming_weights, require_finite
from hf_ddpm.pipeline import DDPMPipeline, check_guide
from hf_ddpm.runtime.devices import process_device, require_compiler
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.scheduler import complete_config
from hf_ddpm.solvers import Sampler, choose_sampler, named_scheduler, require_no_guidance

# What records call the timesteps that a model of arrays takes where none were searched.
DEFAULT_TIMESTEPS = "default_timesteps"


def load_for_sampling(
    model: str,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool = False,
    uniform: bool = False,
    guidance_model: str | None = None,
    makes_from_images: bool = False,
) -> tuple[DDPMPipeline, int]:
    """Load a pipeline that is ready to sample, without progress bars of its own.

    Args:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        scheduler: A name in SCHEDULERS. None: the one that the model's folder keeps (`DDPMPipeline.use`), or unipc;
            dpmsolver++ where timesteps that were searched for this number of steps are better than unipc; ddpm where
            only that can sample the model.
        num_inference_steps: A number in [1, T]. None: the kept one, or 20, or all T for the scheduler `ddpm`.
        device: None: the best device of this process; see `process_device`.
        dtype: The type that the network computes in, a name in DTYPES. x_t and the scheduler's arithmetic stay in
            float32. None: fp32.
        compile: Whether `torch.compile` compiles the network, at its first forward pass.
        uniform: Whether to ignore timesteps that were searched for.
        guidance_model: A weaker model, a folder or a Hub id, for `guide` of the pipeline. None: none.
        makes_from_images: Whether the model must be one that makes images from images, or none of these.

    Returns:
        The pipeline and its number of steps.

    Raises:
        ValueError: When there is no such model, scheduler, device, dtype or number of steps, or weights are NaN.
        OSError: When a file of the model cannot be read.
    """
    if dtype is not None:
        require_choice("dtype", dtype, DTYPES)
    if scheduler is not None:
        require_choice("scheduler", scheduler, SCHEDULERS)
    checked_device = process_device(device)
    folder, _ = find_model(model)
    if compile:
        require_compiler(checked_device)
    _check_kind(folder, model, makes_from_images)
    with naming_weights(f"model {str(model)!r}"):
        pipeline = (ConditionalDDPMPipeline if makes_from_images else DDPMPipeline).from_pretrained(folder)
    require_finite(pipeline.unet.state_dict(), f"model {str(model)!r}")
    pipeline.to(checked_device)
    pipeline.set_progress_bar_config(disable=True)
    if uniform:
        pipeline.searched_timesteps = {}
    pipeline.unet.eval()
    config = pipeline.scheduler.config
    if "beta_schedule" not in config or "prediction_type" not in config:
        raise ValueError(
            f"model must have a scheduler with a beta_schedule and a prediction_type, got {model!r} with "
            f"{type(pipeline.scheduler).__name__}: it is no DDPM"
        )
    kept, searched = pipeline.kept_sampler, pipeline.searched_timesteps
    name, steps, *_ = choose_sampler(config, scheduler, num_inference_steps, kept, searched)
    if guidance_model is not None:
        pipeline.guide = _load_guide(guidance_model, pipeline)
    pipeline.scheduler = named_scheduler(name, config, steps)
    speed_up(pipeline, dtype, compile)
    return pipeline, steps


def _check_kind(folder: Path, model: str | Path, makes_from_images: bool) -> None:
    """Check that a model makes images from images, or that it does not.

    Raises:
        UsageError: When it is of the other kind.
    """
    if is_conditional(folder) and not makes_from_images:
        raise UsageError(
            f"model must be one that makes images from noise alone, got {str(model)!r}, which makes them from images: "
            "hf-ddpm sample MODEL --image FILE_OR_FOLDER"
        )
    if makes_from_images and not is_conditional(folder):
        raise UsageError(
            f"image has no effect on {str(model)!r}, which makes images from noise alone: leave it out, or edit it by "
            "`hf-ddpm edit`"
        )


def require_known_labels(pipeline: DDPMPipeline) -> None:
    """Check that it is known which labels a network takes, if it takes any.

    Raises:
        UsageError: When it has an embedding of something else.
    """
    kind = pipeline.unet.config.get("class_embed_type")
    if kind is not None and pipeline.labels is None:
        raise UsageError(f"classes must be numbers for this, got a model with embeddings {kind!r}")


def check_guidance(
    scales: Sequence[float | None],
    interval: Sequence[float] | None,
    method: Any,
    autoguidance_scale: float | None = None,
) -> None:
    """Check what a command was asked for, before it reads the model.

    Raises:
        ValueError: When a value cannot work.
    """
    for scale in scales:
        # What the model's folder says is known later; 2 stands for it here.
        pair: Any = None if interval is None else tuple(interval)
        changed(None, 2.0 if scale in (None, 1) else scale, pair, method, autoguidance_scale)


def choose_guidance(
    pipeline: DDPMPipeline,
    scale: float | None,
    interval: Sequence[float] | None,
    method: Any,
    autoguidance_scale: float | None,
    guidance_model: str | None,
) -> Guidance | None:
    """Return how a command guides: by what it was asked for, or as the model's folder says; None: not at all.

    The weaker network of the model's folder is loaded here if it is the one that is needed.

    Raises:
        ValueError: When guidance cannot work, or a setting of it has no effect.
    """
    kept = pipeline.kept_sampler
    details = {
        "guidance_interval": interval,
        "guidance_method": method,
        "autoguidance_scale": autoguidance_scale,
        "guidance_model": guidance_model,
    }
    if scale == 1 or (scale is None and (kept is None or kept.guidance is None)):
        for name, value in details.items():
            if value is not None:
                raise UsageError(f"{name} has no effect without guidance, got {value}: give guidance_scale, above 1")
        return None
    pair: Any = None if interval is None else tuple(interval)
    guidance = changed(None if kept is None else kept.guidance, scale, pair, method, autoguidance_scale)
    if guidance is not None:
        require_no_guidance(pipeline.scheduler.config)
        pipeline._check_autoguidance(guidance)
    if guidance is None or pipeline.guide is not None:
        return guidance
    if pipeline._needs_guide(Sampler("", 0, guidance, kept is not None and kept.uses_guide)):
        pipeline.load_guide()
    return guidance


def describe_timesteps(pipeline: DDPMPipeline, num_inference_steps: int) -> dict[str, Any]:
    """Return what records say of the timesteps of a pipeline's scheduler: the searched ones, or those of arrays.

    Args:
        pipeline: The pipeline, with the scheduler that samples.
        num_inference_steps: Its number of steps.

    Returns:
        `timesteps`, the searched ones or None for others; and where a model of arrays takes others than its solver
        does by itself, DEFAULT_TIMESTEPS.
    """
    searched = pipeline.searched_timesteps_for(num_inference_steps)
    if searched is not None:
        return {"timesteps": [*searched.timesteps]}
    default = pipeline.default_timesteps(pipeline.scheduler, num_inference_steps)
    return {"timesteps": None, **({} if default is None else {DEFAULT_TIMESTEPS: default})}


def describe_guidance(guidance: Guidance, pipeline: DDPMPipeline) -> dict[str, Any]:
    """Return all that determines guidance, for records: its settings, and the weaker network."""
    record = {name: value for name, value in asdict(guidance).items() if value != getattr(Guidance(), name)}
    if guidance.interval is not None:
        # JSON has no infinity.
        record["interval"] = [end if math.isfinite(end) else None for end in guidance.interval]
    if pipeline.guide is None:
        return {**record, "weaker": "without a class"}
    digest = hashlib.sha256()
    for name, tensor in pipeline.guide.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return {**record, "weaker": digest.hexdigest()}


def _load_guide(model: str, pipeline: DDPMPipeline) -> Any:
    """Load the network of a weaker model, which must say the same of an image as the pipeline's own.

    Raises:
        UsageError: When there is no such model, or it is of other images, another schedule or prediction type.
    """
    folder = look_at("guidance_model", model)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        # A network alone, as in the folder `guide` of a run; what it predicts stands in no file there.
        network: Any = load_unet(folder, f"guidance_model {model!r}")
        check_guide(network, pipeline.unet)
        return network.to(pipeline.device).eval()
    folder, _ = find_model(model)
    _check_kind(folder, model, isinstance(pipeline, ConditionalDDPMPipeline))
    with naming_weights(f"guidance_model {model!r}"):
        weaker = type(pipeline).from_pretrained(folder)
    require_finite(weaker.unet.state_dict(), f"guidance_model {model!r}")
    ours, theirs = (complete_config(each.scheduler.config) for each in (pipeline, weaker))
    for name in ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"):
        if ours.get(name) != theirs.get(name):
            raise UsageError(
                f"guidance_model must have the model's {name}, {ours.get(name)}, got {theirs.get(name)} of {model!r}"
            )
    check_guide(weaker.unet, pipeline.unet)
    return weaker.unet.to(pipeline.device).eval()


def speed_up(pipeline: DDPMPipeline, dtype: str | None, compile: bool) -> None:
    """Let the networks of a pipeline compute in `dtype` from now on, compiled if `compile` is set."""
    for network in (pipeline.unet, pipeline.guide):
        if network is None:
            continue
        if compile:
            network.forward = compile_network(network.forward, network, pipeline.device)
        if dtype == "bf16":
            network.forward = torch.autocast(pipeline.device.type, torch.bfloat16)(network.forward)
