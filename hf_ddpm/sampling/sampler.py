"""Many images over many processes, one seed per image: on one kind of device, and at one batch size where that is not
a CPU, image i is a function of its seed alone.

Schedulers by name, all with exact lists of timesteps:

    name          class                          order  noise per step
    ddpm          hf_ddpm.DDPMScheduler          1      yes    Ho et al. 2020, Algorithm 2
    ddim          DPMSolverMultistepScheduler    1      no     Song et al. 2021, Eq. 12 with sigma = 0
    dpmsolver++   DPMSolverMultistepScheduler    2      no     Lu et al. 2022, arXiv 2211.01095
    unipc         UniPCMultistepScheduler        2      no     Zhao et al. 2023

DDIM is first-order DPM-Solver++ (Lu et al., Sec. 4); diffusers' own `DDIMScheduler` steps to t - T // n whatever its
list of timesteps says.

The last bits of an image depend on how many images a forward pass has: PyTorch and diffusers choose algorithms by it.
`iter_samples` therefore gives every pass the same number, filling the last one up. On a CPU that is FORWARD_BATCH.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_ddpm.hub.download import find_model
from hf_ddpm.network import compiled
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.devices import best_device, require_device
from hf_ddpm.sampling.schedulers import SCHEDULERS, default_scheduler, default_steps, named_scheduler
from hf_ddpm.scheduler import require_num_inference_steps

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = ("fp32", "bf16")
# From 16 images on PyTorch chooses a CPU's 1x1 convolution without regard to the number of threads, which differs
# between one process and several; from 64 on diffusers lays out what it enlarges in another way.
FORWARD_BATCH = 16


def load_for_sampling(
    model: str,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool = False,
    uniform: bool = False,
) -> tuple[DDPMPipeline, int]:
    """A pipeline that is ready to sample, without progress bars of its own, and the number of its steps.

    Args:
        model: a folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        scheduler: a name in SCHEDULERS; default: unipc, dpmsolver++ where timesteps that are nearer than unipc have
            been searched for so many steps, and ddpm where only that can sample the model.
        num_inference_steps: default: 20, or all T for the scheduler `ddpm`.
        device: default: cuda or mps if there is one, else cpu.
        dtype: of the network's arithmetic, a name in DTYPES; x_t and the scheduler's stay in float32.
        compile: the network by `torch.compile`, at its first forward pass.
        uniform: do without searched timesteps.

    Raises:
        ValueError, OSError: no such model, scheduler, dtype or number of steps.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    place = require_device(device or best_device())
    folder, _ = find_model(model)
    pipeline = DDPMPipeline.from_pretrained(folder).to(place)
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
    name = scheduler or default_scheduler(config, pipeline.searched_timesteps, num_inference_steps)
    num_train = config["num_train_timesteps"]
    steps = num_inference_steps or default_steps(name, num_train)
    require_num_inference_steps(steps, num_train)
    pipeline.scheduler = named_scheduler(name, config, steps)
    speed_up(pipeline, dtype, compile)
    return pipeline, steps


def speed_up(pipeline: DDPMPipeline, dtype: str | None, compile: bool) -> None:
    """Has the network compute in `dtype` from now on, and compiled, as of `load_for_sampling`."""
    if compile:
        pipeline.unet.forward = compiled(pipeline.unet.forward, pipeline.unet, pipeline.device)
    if dtype == "bf16":
        pipeline.unet.forward = torch.autocast(pipeline.device.type, torch.bfloat16)(pipeline.unet.forward)


def share(count: int, rank: int, num_processes: int, block: int = FORWARD_BATCH) -> list[int]:
    """Which of `count` images are of process `rank`: whole blocks, in turn, so that forward passes are full."""
    return [i for i in range(count) if i // block % num_processes == rank]


def iter_samples(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[int] | None = None,
    deterministic: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """One image per seed, a batch at a time, in order: its seeds, and (B, C, H, W) uint8 on the CPU.

    Args:
        seeds: of the images' generators. Which others an image is sampled with changes no bit of it.
        batch_size: images per forward pass; on a CPU there are always FORWARD_BATCH.
        class_labels: one for each seed.

    Raises:
        ValueError: an argument that cannot work, or an image that is not finite.
    """
    size = forward_batch_of(pipeline.device, batch_size)
    for first in range(0, len(seeds), size):
        chosen = [*seeds[first : first + size]]
        # Indices of a full batch; what is over repeats the last image.
        padded = [min(i, len(seeds) - 1) for i in range(first, first + size)]
        labels = None if class_labels is None else [class_labels[i] for i in padded]
        images = _sample(pipeline, [seeds[i] for i in padded], num_inference_steps, labels, deterministic)
        images = images[: len(chosen)]
        if not bool((finite := images.isfinite().flatten(1).all(dim=1)).all()):
            seed = chosen[int(finite.int().argmin())]
            raise ValueError(f"samples must be finite, got NaN for seed {seed}: the weights are damaged or overflow")
        yield chosen, (images * 255).round().to(torch.uint8)


def forward_batch_of(device: torch.device, batch_size: int) -> int:
    """The images of each forward pass of `iter_samples`. Raises: ValueError if `batch_size` is less than 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return FORWARD_BATCH if device.type == "cpu" else batch_size


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
        labels = None if class_labels is None else class_labels[part]
        parts.append(_sample(pipeline, seeds[part], num_inference_steps, labels, deterministic))
    return torch.cat(parts)


def _sample(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    num_inference_steps: int | None,
    class_labels: Sequence[int] | None,
    deterministic: bool,
) -> Tensor:
    """One batch, on the CPU."""
    (images,) = pipeline(
        batch_size=len(seeds),
        generator=seeded_generators(seeds, pipeline.device),
        num_inference_steps=num_inference_steps,
        output_type="pt",
        class_labels=None if class_labels is None else [*class_labels],
        deterministic=deterministic,
        return_dict=False,
    )
    return images.cpu()


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
