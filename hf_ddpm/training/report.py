"""What a finished run leaves for people: figures, `run.json` (the facts of the run) and the card.

The card is written from the files of `output_dir` alone, so that each of its numbers is one that the run recorded.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_ddpm import figures
from hf_ddpm.data.batches import to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.hub.card import write_card
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.files import read_metrics, write_atomically
from hf_ddpm.sampling.sampler import classes_in_turn, seeded_generators
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.previews import _preview_scheduler, _preview_steps, save_preview
from hf_ddpm.training.run import FINISHES, FREE_SPACE, Run
from hf_ddpm.training.saving import HALFLIFE, _averaged_unet, save_model
from hf_ddpm.training.sharding import autocast
from hf_ddpm.training.validation import draw_course

if TYPE_CHECKING:
    from accelerate import Accelerator

NUM_STRIP_COLUMNS = 11
NUM_GIF_FRAMES = 60


def write_report(
    config: TrainingConfig,
    pipeline: DDPMPipeline,
    images: ImageCache | ImageStream,
    progress: Progress,
    global_batch_size: int,
    sampled: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Writes `figures/`, `run.json` and `README.md` of a finished run; for one process to call.

    Args:
        sampled: how `figures/samples.png` was made.
    """
    output_dir = Path(config.output_dir)
    _draw_loss(output_dir)
    draw_course(read_metrics(output_dir / "eval.jsonl"), output_dir / "figures")
    _draw_forward_chain(pipeline, images, output_dir)
    with autocast(accelerator.device, config.mixed_precision):
        _draw_reverse_chain(pipeline, images, output_dir)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    facts = {
        "versions": {name: version(name) for name in ("hf_ddpm", "torch", "diffusers", "accelerate")},
        "data": {
            "name": images.name,
            "num_images": images.num_images,
            "num_bad_images": progress.num_bad_images,
            "resolution": images.resolution,
            "channels": images.channels,
            "class_names": images.class_names,
            "fingerprint": images.fingerprint,
            "license": images.license,
        },
        "model": {
            "num_parameters": sum(p.numel() for p in unet.parameters()),
            "abar_T": float(scheduler.alpha_bar[-1]),
        },
        "training": {
            "steps": progress.step,
            "images": progress.images,
            "seconds": round(progress.seconds, 1),
            "num_resumes": progress.num_resumes,
            "num_bad_steps": progress.num_bad_steps,
            "global_batch_size": global_batch_size,
            "num_processes": accelerator.num_processes,
            "mixed_precision": config.mixed_precision,
            "device": device_name(accelerator.device),
        },
        "samples": sampled,
    }
    write_atomically(output_dir / "run.json", json.dumps(facts, indent=2) + "\n")
    try:
        write_card(output_dir)
    except BaseException:
        (output_dir / "run.json").unlink()  # a run that has it is finished
        raise


def _draw_loss(output_dir: Path) -> None:
    records = [r for r in read_metrics(output_dir / "metrics.jsonl") if r["loss"] is not None]
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    window = max(1, len(losses) // 20)
    means = [sum(part) / len(part) for part in (losses[max(0, i - window) : i + 1] for i in range(len(losses)))]
    series = {"loss": (steps, losses), f"mean of the last {window + 1}": (steps, means)}
    figures.curve(output_dir / "figures" / "loss.png", series, "step", "loss", log_y=True)


def _draw_forward_chain(pipeline: DDPMPipeline, images: ImageCache | ImageStream, output_dir: Path) -> None:
    """A training image carried through the Markov chain."""
    scheduler, side = pipeline.scheduler, images.resolution
    x_0 = to_x_0(torch.as_tensor(images.image(0)[:, :side, :side].astype("int32")), images.max_value)
    timesteps = _spread(len(scheduler), NUM_STRIP_COLUMNS - 1)
    chain = figures.forward_chain(x_0, scheduler, [-1, *timesteps], torch.Generator().manual_seed(0))
    labels = ["x_0", *(f"t = {t}" for t in timesteps)]
    figures.strip([figures.to_images(chain)], labels).save(output_dir / "figures" / "forward.png")


def _draw_reverse_chain(pipeline: DDPMPipeline, images: ImageCache | ImageStream, output_dir: Path) -> None:
    """Two samples emerging over all T steps: x_t and x_0_hat as a strip, x_t as an animation."""
    total = len(pipeline.scheduler)
    columns = [total - 1 - t for t in reversed(_spread(total, NUM_STRIP_COLUMNS - 1))]
    frames = sorted({*_spread(total, NUM_GIF_FRAMES), *columns})
    pipeline.set_progress_bar_config(desc="reverse chain", leave=False)
    final, trajectory = pipeline(
        batch_size=2,
        generator=seeded_generators(range(2), pipeline.device),
        output_type="pt",
        class_labels=classes_in_turn(images.num_classes, range(2)),
        trajectory=frames,
        return_dict=False,
    )
    final = 2 * final.cpu() - 1
    steps = dict(zip(frames, trajectory, strict=True))
    rows, names = [], []
    for i in range(2):
        rows.append(figures.to_images(torch.stack([*(steps[k].x_t[i] for k in columns), final[i]])))
        rows.append(figures.to_images(torch.stack([*(steps[k].x_0_hat[i] for k in columns), final[i]])))
        names += ["x_t", "x_0_hat"]
    column_labels = [*(f"t = {steps[k].timestep}" for k in columns), "image"]
    figures.strip(rows, column_labels, names).save(output_dir / "figures" / "reverse.png")
    pictures = [figures.grid(figures.to_images(x), columns=2) for x in [*(s.x_t for s in steps.values()), final]]
    figures.chain_gif(pictures, output_dir / "figures" / "reverse.gif")


def _spread(total: int, count: int) -> list[int]:
    """At most `count` whole numbers from 0 to total - 1, evenly."""
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def finish(run: Run, progress: Progress) -> DDPMPipeline:
    """Writes what a finished run leaves; a run that is finished already writes the same again."""
    config, output_dir = run.config, run.output_dir
    saved = [save_model(run, run.average, output_dir)]
    for name, average in list(run.state.ema.averages.items() if run.state.ema is not None else ())[1:]:
        if name.startswith(HALFLIFE):
            saved.append(save_model(run, average, output_dir / "ema" / name))
    if not run.processes.on_main(lambda: all(saved)):
        raise RunError(f"the model could not be written, its last checkpoint is whole. {FREE_SPACE}; {FINISHES}")
    samples = save_preview(run, progress.step)
    averaged: Any = _averaged_unet(run, run.average)
    pipeline = DDPMPipeline(averaged.to(run.accelerator.device), DDPMScheduler.from_config(run.scheduler.config))

    def write() -> None:
        samples.save(output_dir / "figures" / "samples.png")
        sampled = {
            "scheduler": type(_preview_scheduler(run)).__name__,
            "num_inference_steps": _preview_steps(run),
            "seed": 0,
            "ema": config.use_ema,
        }
        write_report(config, pipeline, run.images, progress, run.global_batch_size, sampled, run.accelerator)

    try:
        run.processes.on_main(write)
    except (OSError, UsageError) as error:  # the latter of a file that somebody edits, with its own remedy
        remedy = "" if isinstance(error, UsageError) else f". {FREE_SPACE}"
        raise RunError(f"the report could not be written: {error}{remedy}; {FINISHES}") from error
    return pipeline
