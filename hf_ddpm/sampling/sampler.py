"""Many images, each from its seed.

On one kind of device an image is a function of its seed alone; where that is not a CPU, of the batch size, too.

The last bits of an image depend on how many images a forward pass has, because PyTorch and diffusers choose algorithms
by it. `iter_samples` therefore gives every forward pass the same number of images and fills the last one up. On a CPU
that number is FORWARD_BATCH. Which images are in a forward pass then changes no bit of any of them, so that processes
can share them in any way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.classes import Classes
from hf_ddpm.condition import is_conditional
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.figures import grid, with_row_titles
from hf_ddpm.guidance import Guidance, changed
from hf_ddpm.hub.download import find_model
from hf_ddpm.labels import Labels
from hf_ddpm.names import DTYPES, SCHEDULERS
from hf_ddpm.network import compile_network, load_unet, naming_weights, require_finite
from hf_ddpm.pipeline import DDPMPipeline, check_guide
from hf_ddpm.runtime.devices import process_device, require_compiler
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.scheduler import complete_config
from hf_ddpm.solvers import Sampler, choose_sampler, named_scheduler
from hf_ddpm.value_range import ValueRange

# From 16 images on, PyTorch chooses a CPU's 1x1 convolution without regard to the number of threads, which differs
# between one process and several; from 64 images on, diffusers lays out what it enlarges in another way.
FORWARD_BATCH = 16


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


def check_guidance(scales: Sequence[float | None], interval: Sequence[float] | None, method: Any) -> None:
    """Check what a command was asked for, before it reads the model.

    Raises:
        ValueError: When a value cannot work.
    """
    for scale in scales:
        # What the model's folder says is known later; 2 stands for it here.
        pair: Any = None if interval is None else tuple(interval)
        changed(None, 2.0 if scale in (None, 1) else scale, pair, method)


def choose_guidance(
    pipeline: DDPMPipeline,
    scale: float | None,
    interval: Sequence[float] | None,
    method: Any,
    guidance_model: str | None,
) -> Guidance | None:
    """Return how a command guides: by what it was asked for, or as the model's folder says; None: not at all.

    The weaker network of the model's folder is loaded here if it is the one that is needed.

    Raises:
        ValueError: When guidance cannot work, or a setting of it has no effect.
    """
    kept = pipeline.kept_sampler
    details = {"guidance_interval": interval, "guidance_method": method, "guidance_model": guidance_model}
    if scale == 1 or (scale is None and (kept is None or kept.guidance is None)):
        for name, value in details.items():
            if value is not None:
                raise UsageError(f"{name} has no effect without guidance, got {value}: give guidance_scale, above 1")
        return None
    pair: Any = None if interval is None else tuple(interval)
    guidance = changed(None if kept is None else kept.guidance, scale, pair, method)
    if guidance is None or pipeline.guide is not None:
        return guidance
    if pipeline._needs_guide(Sampler("", 0, guidance, kept is not None and kept.uses_guide)):
        pipeline.load_guide()
    return guidance


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


def labels_in_turn(labels: Labels | None, numbers: Iterable[int]) -> list[Any] | None:
    """Return a label for each image, by its number: classes or quantiles in turn. None for a model without labels."""
    if labels is None:
        return None
    shown = labels.in_turn
    return [shown[number % len(shown)] for number in numbers]


def grid_by_label(num_images: int, labels: Labels | None) -> tuple[int, int | None]:
    """Return the number of images of a grid, and of its columns where each of its rows shows one label.

    There are at least two columns, and the last one is filled up.

    Args:
        num_images: The number of images that are asked for.
        labels: The labels of the images, which come in turn. None, or more than images: the rows show no labels.
    """
    if labels is None or len(labels.in_turn) > num_images:
        return num_images, None
    columns = max(2, -(-num_images // len(labels.in_turn)))
    return columns * len(labels.in_turn), columns


def by_label(images: Sequence[Any], columns: int | None) -> Sequence[Any]:
    """Return images whose labels come in turn in the order of a grid of so many columns, a row for each label."""
    if columns is None:
        return images
    num_rows = len(images) // columns
    return [images[column * num_rows + row] for row in range(num_rows) for column in range(columns)]


def sheet_by_label(images: Sequence[Image.Image], columns: int | None, labels: Labels | None) -> Image.Image:
    """Return a grid of images whose labels come in turn, a row for each label; numbers stand beside their rows.

    Args:
        images: The images.
        columns: The columns of the grid; None: the rows show no labels.
        labels: The labels of the images.
    """
    sheet = grid(by_label(images, columns), columns)
    if columns is None or labels is None or isinstance(labels, Classes):
        return sheet
    return with_row_titles(sheet, labels.titles)


def iter_samples(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[Any] | None = None,
    deterministic: bool = False,
    value_range: Sequence[float] | ValueRange | None = None,
    guidance: Guidance | None = None,
    conditions: Tensor | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield one image per seed, a batch at a time, in order: the batch's seeds, and (B, C, H, W) on the CPU.

    Args:
        seeds: The seeds of the images' generators.
        batch_size: Images per forward pass; on a CPU there are always FORWARD_BATCH.
        num_inference_steps: A number in [1, T]. None: T.
        class_labels: One for each seed, if the model has labels.
        deterministic: Whether to iterate the mean of each reverse step, without noise; for `ddpm` only.
        value_range: The values in [0, 65535] that -1 and 1 stand for; the images are then uint16. The values of a
            model of arrays: the images are then in its type. None: they are uint8, and the values are 0 and 255.
        guidance: How predictions are guided; None: they are not.
        conditions: See `sample_all`.

    Raises:
        ValueError: When an argument cannot work, or an image is not finite.
    """
    steps = num_inference_steps
    batches = _sample(pipeline, seeds, batch_size, steps, class_labels, deterministic, guidance, conditions)
    for batch_seeds, images in batches:
        is_finite = images.isfinite().flatten(1).all(dim=1)
        if not bool(is_finite.all()):
            seed = batch_seeds[int(is_finite.int().argmin())]
            raise ValueError(f"samples must be finite, got NaN for seed {seed}: the weights are damaged or overflow")
        if isinstance(value_range, ValueRange):
            yield batch_seeds, torch.from_numpy(value_range.to_units(images))
        elif value_range is None:
            yield batch_seeds, (images * 255).round().to(torch.uint8)
        else:
            low, high = value_range
            values = (images.double() * (high - low) + low).round()
            yield batch_seeds, values.clamp(0, 65535).to(torch.uint16)


def sample_all(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    processes: Processes,
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[Any] | None = None,
    conditions: Tensor | None = None,
) -> Tensor:
    """Sample one image per seed; the processes share the seeds, and each of them gets all images.

    Each process makes as many forward passes as any other, so that their network may be one that is divided among
    them. What is not finite in an image becomes black: a model in training may give such images.

    Args:
        seeds: The seeds of the images' generators; at least one.
        batch_size: Images per forward pass; on a CPU there are always FORWARD_BATCH.
        num_inference_steps: A number in [1, T]. None: T.
        class_labels: One for each seed, if the model has labels.
        conditions: One for each seed, (N, C', H, W) in [0, 1], if the model makes images from images.

    Returns:
        The images in the order of the seeds, (N, C, H, W) uint8 on the CPU.

    Raises:
        ValueError: When an argument cannot work.
    """
    share = processes.split_evenly(len(seeds))
    labels = None if class_labels is None else [class_labels[i] for i in share]
    own = None if conditions is None else conditions[[*share]]
    batches = _sample(pipeline, [seeds[i] for i in share], batch_size, num_inference_steps, labels, conditions=own)
    images = torch.cat([images for _, images in batches]).nan_to_num(0)
    return processes.gather_rows((images * 255).round().to(torch.uint8), len(seeds))


def _sample(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    batch_size: int,
    num_inference_steps: int | None,
    class_labels: Sequence[Any] | None,
    deterministic: bool = False,
    guidance: Guidance | None = None,
    conditions: Tensor | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the seeds of each batch and its images in [0, 1], on the CPU."""
    size = forward_batch_of(pipeline.device, batch_size)
    for first in range(0, len(seeds), size):
        batch_seeds = [*seeds[first : first + size]]
        # The last batch is made as large as the others by repeating its last image.
        filled = [min(i, len(seeds) - 1) for i in range(first, first + size)]
        # A model that makes images from images takes these in the place of their number.
        number: dict[str, Any] = {"batch_size": size} if conditions is None else {"image": conditions[filled]}
        (images,) = pipeline(
            **number,
            generator=seeded_generators([seeds[i] for i in filled], pipeline.device),
            num_inference_steps=num_inference_steps,
            output_type="pt",
            class_labels=None if class_labels is None else [class_labels[i] for i in filled],
            deterministic=deterministic,
            guidance=guidance,
            return_dict=False,
        )
        yield batch_seeds, images[: len(batch_seeds)].cpu()


def forward_batch_of(device: torch.device, batch_size: int) -> int:
    """Return the number of images in each forward pass of `iter_samples`.

    Raises:
        ValueError: When `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return FORWARD_BATCH if device.type == "cpu" else batch_size


def seeded_generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Return one generator for each image, on its device; on the CPU for MPS, where noise is not reproducible."""
    noise_device = torch.device("cpu") if device.type == "mps" else device
    return [torch.Generator(noise_device).manual_seed(seed) for seed in seeds]
