"""Many images over many processes, one seed per image: on one kind of device, image i is a function of
its seed alone.

Schedulers by name, all with exact lists of timesteps:

    name          class                          order  noise per step
    ddpm          hf_ddpm.DDPMScheduler          1      yes    Ho et al. 2020, Algorithm 2
    ddim          DPMSolverMultistepScheduler    1      no     Song et al. 2021, Eq. 12 with sigma = 0
    dpmsolver++   DPMSolverMultistepScheduler    2      no     Lu et al. 2022, arXiv 2211.01095
    unipc         UniPCMultistepScheduler        2      no     Zhao et al. 2023

DDIM is first-order DPM-Solver++ (Lu et al., Sec. 4); diffusers' own `DDIMScheduler` steps to t - T // n whatever its
list of timesteps says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from hf_ddpm.figures import grid, to_images
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.scheduler import DDPMScheduler, all_values

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc")
SOLVABLE_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def default_scheduler(config: Any) -> str:
    """The name of the scheduler that takes fewest steps for a model whose scheduler has this config."""
    solvable = config["prediction_type"] != "previous_sample" and config["beta_schedule"] in SOLVABLE_SCHEDULES
    return "dpmsolver++" if solvable else "ddpm"


def named_scheduler(name: str, config: Any, num_inference_steps: int | None = None) -> Any:
    """The scheduler called `name` for a model whose scheduler has this config.

    Args:
        num_inference_steps: what it will be used with; default: T.

    Raises:
        ValueError: no such name, or a step denoiser, which only `ddpm` can sample.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    config = all_values(config)
    if name == "ddpm":
        return DDPMScheduler.from_config(config)
    if config["prediction_type"] == "previous_sample":
        raise ValueError(
            f"scheduler must be 'ddpm' for a step denoiser (prediction_type='previous_sample'), got {name!r}"
        )
    # The solvers' linspace is exact for each n < T and repeats timesteps for n = T, where trailing is exact. They
    # slice a learned variance off as if images had three channels; the pipeline has already dropped it.
    if config["beta_schedule"] not in SOLVABLE_SCHEDULES:
        raise ValueError(f"scheduler must be 'ddpm' for the noise schedule {config['beta_schedule']!r}, got {name!r}")
    uses_all = num_inference_steps in (None, config["num_train_timesteps"])
    spacing = "trailing" if uses_all else "linspace"
    exact = {**config, "timestep_spacing": spacing, "variance_type": None, "solver_order": 2}
    # They do not know clip_sample, without which an error of eps_hat at T-1 is multiplied by thousands in x_0_hat.
    # Thresholding up to 1 is the same as clipping to [-1, 1].
    if config["clip_sample"] and config["clip_sample_range"] == 1:
        exact |= {"thresholding": True, "sample_max_value": 1.0}
    if name == "unipc":
        return UniPCMultistepScheduler.from_config(exact)
    solver = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "solver_order": 1 if name == "ddim" else 2}
    return DPMSolverMultistepScheduler.from_config({**exact, **solver})


def write_samples(
    model: str,
    out: Path,
    *,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    class_label: int | None = None,
    deterministic: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Samples a model into `out`: one PNG for each seed from `seed` on, and all of them as grid.png.

    Args:
        model: a folder that holds a pipeline, stock diffusers' or ours, or a Hub id.
        num_inference_steps: default: 20, or all T for the scheduler `ddpm`.
        scheduler: a name in SCHEDULERS; default: dpmsolver++, and ddpm for a step denoiser.
        class_label: default: each class in turn.

    Raises:
        ValueError, OSError: before sampling, no such model, or a file that would be overwritten.
    """
    files = [out / f"{seed + i:06d}.png" for i in range(num_images)]
    if taken := [path for path in [out / "grid.png", *files] if path.exists()]:
        raise ValueError(f"{taken[0]} would be overwritten: choose another folder than {str(out)!r} or another seed")
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"model must be a folder with model_index.json, got {model!r}, which has none")
    pipeline = DDPMPipeline.from_pretrained(model).to(device or _best_device())
    config = pipeline.scheduler.config
    name = scheduler or default_scheduler(config)
    steps = num_inference_steps or (config["num_train_timesteps"] if name == "ddpm" else 20)
    pipeline.scheduler = named_scheduler(name, config, steps)
    classes = pipeline.unet.config.num_class_embeds
    labels = None
    if classes is not None or class_label is not None:
        labels = [i % (classes or 1) if class_label is None else class_label for i in range(num_images)]
    samples = sample_images(
        pipeline,
        range(seed, seed + num_images),
        batch_size=batch_size,
        num_inference_steps=steps,
        class_labels=labels,
        deterministic=deterministic,
    )
    images = to_images(2 * samples - 1)
    out.mkdir(parents=True, exist_ok=True)
    for image, path in zip(images, files, strict=True):
        image.save(path)
    grid(images).save(out / "grid.png")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def seeded_generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """One generator for each image, on its device; on the CPU for MPS, where noise is not reproducible."""
    place = torch.device("cpu") if device.type == "mps" else device
    return [torch.Generator(place).manual_seed(seed) for seed in seeds]


def sample_images(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[int] | None = None,
    deterministic: bool = False,
) -> Tensor:
    """One image per seed, on the CPU, (len(seeds), C, H, W) in [0, 1].

    Args:
        seeds: of the images' generators.
        batch_size: images per forward pass; changes no image beyond rounding.
        class_labels: one for each seed.
    """
    parts = []
    for first in range(0, len(seeds), batch_size):
        part = slice(first, first + batch_size)
        generators = seeded_generators(seeds[part], pipeline.device)
        (images,) = pipeline(
            batch_size=len(generators),
            generator=generators,
            num_inference_steps=num_inference_steps,
            output_type="pt",
            class_labels=None if class_labels is None else list(class_labels[part]),
            deterministic=deterministic,
            return_dict=False,
        )
        parts.append(images.cpu())
    return torch.cat(parts)


def sample_shared(
    accelerator: Accelerator,
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[int] | None = None,
) -> Tensor:
    """`sample_images` with the seeds shared among the processes; each of them gets all images, in order."""
    count, rank, num = len(seeds), accelerator.process_index, accelerator.num_processes
    # Each process samples as many images, so that the gather has one shape; what is over is dropped.
    share = -(-count // num)
    mine = [min(i, count - 1) for i in range(rank * share, (rank + 1) * share)]
    images = sample_images(
        pipeline,
        [seeds[i] for i in mine],
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        class_labels=None if class_labels is None else [class_labels[i] for i in mine],
    )
    gathered: Any = accelerator.gather(images.to(accelerator.device))
    return gathered.cpu()[:count]
