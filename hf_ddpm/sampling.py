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

The last bits of an image depend on how many images a forward pass has: PyTorch and diffusers choose algorithms by it.
`iter_samples` therefore gives every pass the same number, filling the last one up. On a CPU that is FORWARD_BATCH.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hf_ddpm.figures import grid
from hf_ddpm.files import weights_sha256, write_atomically
from hf_ddpm.launch import run_command
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.scheduler import DDPMScheduler, all_values

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES, FORMATS = ("fp32", "bf16"), ("png", "parquet", "npz")
# From 16 images on PyTorch chooses a CPU's 1x1 convolution without regard to the number of threads, which differs
# between one process and several; from 64 on diffusers lays out what it enlarges in another way.
FORWARD_BATCH = 16
GRID_IMAGES = 64
# A set is written in at most so many parts, unless that makes them large.
MAX_PARTS, MAX_PART_IMAGES = 64, 1024
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


def load_for_sampling(
    model: str,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool = False,
) -> tuple[DDPMPipeline, int]:
    """A pipeline that is ready to sample, without progress bars of its own, and the number of its steps.

    Args:
        model: a folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
        scheduler: a name in SCHEDULERS; default: dpmsolver++, and ddpm where only that can sample the model.
        num_inference_steps: default: 20, or all T for the scheduler `ddpm`.
        device: default: cuda or mps if there is one, else cpu.
        dtype: of the network's arithmetic, a name in DTYPES; x_t and the scheduler's stay in float32.
        compile: the network by `torch.compile`, at its first forward pass.

    Raises:
        ValueError, OSError: no such model, scheduler, dtype or number of steps.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        hint = ": the run has not saved its model yet" if (folder / "config.yaml").is_file() else ""
        raise ValueError(f"model must be a folder with model_index.json, got {str(model)!r}, which has none{hint}")
    if not folder.exists():
        folder = Path(DDPMPipeline.download(str(model)))
    pipeline = DDPMPipeline.from_pretrained(folder).to(device or _best_device())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    config = pipeline.scheduler.config
    name, num_train = scheduler or default_scheduler(config), config["num_train_timesteps"]
    steps = num_inference_steps or (num_train if name == "ddpm" else min(20, num_train))
    if not 1 <= steps <= num_train:
        raise ValueError(
            f"num_inference_steps must be in [1, {num_train}], got {steps}: "
            f"the model was trained with {num_train} timesteps"
        )
    pipeline.scheduler = named_scheduler(name, config, steps)
    if compile:
        pipeline.unet.forward = torch.compile(pipeline.unet.forward, dynamic=False)
    if dtype == "bf16":
        pipeline.unet.forward = torch.autocast(pipeline.device.type, torch.bfloat16)(pipeline.unet.forward)
    return pipeline, steps


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
    size = _forward_batch(pipeline.device, batch_size)
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


def _forward_batch(device: torch.device, batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return FORWARD_BATCH if device.type == "cpu" else batch_size


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
    dtype: str | None = None,
    compile: bool = False,
    format: str = "png",
) -> None:
    """Samples a model into `out`: an image for each seed from `seed` on, and the first 64 of them as grid.png.

    Each process that was launched writes its share; what `out` holds of the same set is kept.

        format    files                                      lost when a process is killed
        png       000000.png, named by seed                  the images of a forward pass
        parquet   data/train-00000-of-00064.parquet, ...     a file; `datasets.load_dataset(out)` reads all of them
        npz       samples.npz: arr_0 (N,H,W,C), seeds        a 64th of the set, of at most 1024 images

    Args:
        model, num_inference_steps, scheduler, device, dtype, compile: as of `load_for_sampling`.
        class_label: default: each class in turn.
        deterministic, batch_size: as of `iter_samples`.
        format: a name in FORMATS.

    Raises:
        ValueError, OSError: before sampling, no such model, a setting that cannot work, or a folder of something else.
    """
    from accelerate import PartialState

    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # A process that is ready waits for the slowest.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    own: Any = state.device  # of this process, if there are several
    place = own if device in (None, own.type) else torch.device(device)
    pipeline, steps = load_for_sampling(model, scheduler, num_inference_steps, place, dtype, compile)
    unet = pipeline.unet
    if format != "npz" and unet.config.in_channels not in (1, 3, 4):
        raise ValueError(f"format must be 'npz' for images of {unet.config.in_channels} channels, got {format!r}")
    classes, labels = unet.config.num_class_embeds, None
    if classes is not None or class_label is not None:
        labels = [i % (classes or 1) if class_label is None else class_label for i in range(num_images)]
    pipeline._check_inputs(1, None, "pt", ("latents",), deterministic)
    pipeline._conditions(labels and labels[:1], 1, pipeline.device)
    forward_batch = _forward_batch(pipeline.device, batch_size)
    settings = {
        "model": str(model),
        "weights_sha256": weights_sha256(Path(unet.config["_name_or_path"])),
        "scheduler": scheduler or default_scheduler(pipeline.scheduler.config),
        "num_inference_steps": steps,
        "seed": seed,
        "num_images": num_images,
        "class_label": class_label,
        "deterministic": deterministic,
        "dtype": dtype or "fp32",
        "compile": compile,
        "format": format,
        "device": pipeline.device.type,
        "forward_batch": forward_batch,
    }
    samples = (
        _Pngs(out, seed, labels, num_images) if format == "png" else _Parts(out, seed, labels, num_images, format)
    )
    _check_folder(out, settings, samples.existing())
    if state.is_main_process:
        write_atomically(out / "samples.json", json.dumps(settings, indent=2) + "\n")

    mine = share(num_images, state.process_index, state.num_processes, samples.block or forward_batch)
    missing = samples.missing(mine)
    batches = iter_samples(
        pipeline,
        [seed + i for i in missing],
        batch_size=batch_size,
        num_inference_steps=steps,
        class_labels=None if labels is None else [labels[i] for i in missing],
        deterministic=deterministic,
    )
    of_all = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    done = len(mine) - len(missing)
    with tqdm(
        total=len(mine), initial=done, unit="image", desc=f"Sampling{of_all}", disable=not state.is_main_process
    ) as bar:
        for seeds, images in batches:
            samples.add([s - seed for s in seeds], images.permute(0, 2, 3, 1).numpy())
            bar.update(len(seeds))
    state.wait_for_everyone()
    if state.is_main_process:
        first = samples.finish()
        if unet.config.in_channels in (1, 3, 4):
            write_atomically(out / "grid.png", _png(grid([_image(pixels) for pixels in first])))
    state.destroy_process_group()


class _Pngs:
    """A set as one PNG file per image."""

    block = None

    def __init__(self, out: Path, seed: int, labels: Sequence[int] | None, count: int):
        self.out, self.count = out, count
        self.names = [f"{seed + i:06d}.png" for i in range(count)]

    def existing(self) -> list[Path]:
        there = set(os.listdir(self.out)) if self.out.is_dir() else set()
        return [self.out / name for name in ["grid.png", *self.names] if name in there]

    def missing(self, indices: Sequence[int]) -> list[int]:
        there = set(self.existing())
        return [i for i in indices if self.out / self.names[i] not in there]

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        for i, pixels in zip(indices, images, strict=True):
            write_atomically(self.out / self.names[i], _png(_image(pixels)))

    def finish(self) -> list[np.ndarray]:
        found = []
        for name in self.names[:GRID_IMAGES]:
            with Image.open(self.out / name) as image:
                found.append(np.asarray(image).reshape(image.height, image.width, -1))
        return found


class _Parts:
    """A set as files of many images: Parquet, or NumPy files that become one."""

    def __init__(self, out: Path, seed: int, labels: Sequence[int] | None, count: int, format: str):
        self.out, self.seed, self.labels, self.count, self.format = out, seed, labels, count, format
        self.block = min(MAX_PART_IMAGES, FORWARD_BATCH * -(-count // (MAX_PARTS * FORWARD_BATCH)))
        num = -(-count // self.block)
        stem = "data/train" if format == "parquet" else "parts/part"
        self.files = [out / f"{stem}-{k:05d}-of-{num:05d}.{format}" for k in range(num)]
        self.whole = out / "samples.npz"
        self.unwritten: dict[int, np.ndarray] = {}

    def existing(self) -> list[Path]:
        return [path for path in [self.out / "grid.png", self.whole, *self.files] if path.exists()]

    def missing(self, indices: Sequence[int]) -> list[int]:
        there = set(self.existing())
        return [] if self.whole in there else [i for i in indices if self.files[i // self.block] not in there]

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        self.unwritten.update(zip(indices, images, strict=True))
        for part in sorted({i // self.block for i in self.unwritten}):
            members = range(part * self.block, min((part + 1) * self.block, self.count))
            if all(i in self.unwritten for i in members):
                pixels = np.stack([self.unwritten.pop(i) for i in members])
                encode = self._parquet if self.format == "parquet" else self._npz
                write_atomically(self.files[part], encode(members, pixels))

    def _npz(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        columns = {"arr_0": pixels, "seeds": np.array([self.seed + i for i in members])}
        if self.labels is not None:
            columns["labels"] = np.array([self.labels[i] for i in members])
        content = io.BytesIO()
        np.savez(content, **columns)  # pyright: ignore[reportArgumentType]
        return content.getvalue()

    def _parquet(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        seeds = [self.seed + i for i in members]
        images = [{"bytes": _png(_image(p)), "path": f"{s:06d}.png"} for s, p in zip(seeds, pixels, strict=True)]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {"image": pa.array(images, kind), "seed": pa.array(seeds, pa.int64())}
        integer = {"dtype": "int64", "_type": "Value"}
        features = {"image": {"_type": "Image"}, "seed": integer}
        if self.labels is not None:
            columns["label"] = pa.array([self.labels[i] for i in members], pa.int64())
            features["label"] = integer
        # As `datasets` writes it, which takes the column for an image by this alone.
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        content = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), content)
        return content.getvalue()

    def finish(self) -> list[np.ndarray]:
        if self.format == "parquet":
            import pyarrow.parquet as pq

            found: list[np.ndarray] = []
            for path in self.files[: -(-GRID_IMAGES // self.block)]:
                for image in pq.read_table(path, columns=["image"])["image"].to_pylist():
                    with Image.open(io.BytesIO(image["bytes"])) as opened:
                        found.append(np.asarray(opened).reshape(opened.height, opened.width, -1))
            return found[:GRID_IMAGES]
        if not self.whole.exists():
            parts = [np.load(path)["arr_0"] for path in self.files]
            write_atomically(self.whole, self._npz(range(self.count), np.concatenate(parts)))
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        return [*np.load(self.whole)["arr_0"][:GRID_IMAGES]]


def _check_folder(out: Path, settings: dict[str, Any], existing: Sequence[Path]) -> None:
    """Raises: ValueError if `out` holds another set, or `existing` files that are of none."""
    # Read after `existing` was listed: another process of this run writes it before any of them.
    try:
        before = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if existing:
            raise ValueError(
                f"{existing[0]} would be overwritten: choose another folder than {str(out)!r} or another seed"
            ) from None
        return
    # A set of PNG files may grow, and what a model is called changes nothing.
    grows = settings["format"] == "png" and before.get("num_images", 0) <= settings["num_images"]
    free = {"model", "num_images"} if grows else {"model"}
    if differing := [key for key in settings if key not in free and before.get(key) != settings[key]]:
        was = ", ".join(f"{key}={before.get(key)!r}" for key in differing)
        now = ", ".join(f"{key}={settings[key]!r}" for key in differing)
        raise ValueError(f"{out} holds samples with {was}, got {now}: choose another folder, or those settings")


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


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


if __name__ == "__main__":
    run_command("sample", __spec__.name)
