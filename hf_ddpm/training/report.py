"""The files that a run leaves for people: figures, `run.json` (the facts of the run) and the card.

The card is written from the files of `output_dir` alone, so that each of its numbers is one that the run recorded.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_ddpm import figures, plots
from hf_ddpm.data.batches import as_tensor, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import example_pairs
from hf_ddpm.data.held_out import HELD_OUT_SPLIT
from hf_ddpm.data.planes import center_crop
from hf_ddpm.data.tables import divide_training
from hf_ddpm.hub.card import write_card
from hf_ddpm.image_size import to_resolution
from hf_ddpm.labels import describe_labels
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.files import read_metrics, write_atomically
from hf_ddpm.runtime.run_files import LAST_PICTURES
from hf_ddpm.sampling.sampler import labels_in_turn, seeded_generators
from hf_ddpm.training import sharding
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.previews import preview_settings, sample_sheet, save_preview
from hf_ddpm.training.run import FINISHES, FREE_SPACE, Run, num_steps_left, print_once, try_to_write
from hf_ddpm.training.saving import averaged_unet, pipeline_of, save_models, scheduler_to_save
from hf_ddpm.training.validation_curves import draw_validation_curves
from hf_ddpm.value_range import pictured

NUM_GIF_FRAMES = 60
CHAIN_SIZE = 2  # images
# The reverse chain takes less time than this share of the run's steps, or than so many steps, whichever is more.
CHAIN_SHARE, CHAIN_STEPS = 0.05, 10


def finish_run(run: Run, progress: Progress) -> DDPMPipeline:
    """Write what a finished run leaves, and return its pipeline; a run that is finished writes the same again.

    Raises:
        RunError: The model or the report could not be written; the message says how to finish the run.
    """
    if not save_models(run):
        raise RunError(f"the model could not be written, its last checkpoint is whole. {FREE_SPACE}; {FINISHES}")
    samples = save_preview(run, progress.step, has_bar=True)
    pipeline = _averaged_pipeline(run)
    try:
        run.processes.on_main(lambda: write_report(run, progress, pipeline, samples))
    except (OSError, UsageError) as error:  # a UsageError is of a file that somebody edits, and has a remedy
        remedy = "" if isinstance(error, UsageError) else f". {FREE_SPACE}"
        raise RunError(f"the report could not be written: {error}{remedy}; {FINISHES}") from error
    return pipeline


def leave_model(run: Run, progress: Progress) -> bool:
    """Write what a run leaves that is stopped before its end: model, card and pictures, as far as it gets.

    They come in this order, because whoever stopped the run may end it at any moment. A run that is resumed needs none
    of them, so what cannot be written is printed. All processes call it.

    Returns:
        On all processes, whether the model was written.
    """
    # Until there are new ones, the pictures of an earlier stop would pass for those of this model.
    run.processes.on_main(lambda: try_to_write(run, lambda: _delete_pictures(run.output_dir)))
    try:
        if not save_models(run):
            return False
    except UsageError as error:
        print_once(run.processes, f"no model is written: {error}")
        return False
    pipeline = _averaged_pipeline(run)

    def write(samples: Image.Image | None) -> None:
        try:
            write_report(run, progress, pipeline, samples)
        except (OSError, UsageError) as error:
            print_once(run.processes, f"card and pictures could not be written, the model is whole: {error}")

    run.processes.on_main(lambda: write(None))
    samples = sample_sheet(run, has_bar=True)
    run.processes.on_main(lambda: write(samples))
    return True


def _delete_pictures(output_dir: Path) -> None:
    for name in LAST_PICTURES:
        (output_dir / name).unlink(missing_ok=True)


def _averaged_pipeline(run: Run) -> DDPMPipeline:
    averaged: Any = averaged_unet(run, run.average)
    return pipeline_of(run, averaged.to(run.device), scheduler_to_save(run))


def write_report(run: Run, progress: Progress, pipeline: DDPMPipeline, samples: Image.Image | None) -> None:
    """Write `figures/`, `run.json` and `README.md` of a run; without samples no figures. One process calls it."""
    output_dir = run.output_dir
    if samples is not None:
        samples.save(output_dir / "figures" / "samples.png")
        draw_validation_curves(read_metrics(output_dir / "eval.jsonl"), output_dir / "figures")
        if run.config.save_figures:
            _draw_figures(run, progress, pipeline)
    facts = run_facts(run, progress, pipeline)
    write_atomically(output_dir / "run.json", json.dumps(facts, indent=2) + "\n")
    try:
        write_card(output_dir)
    except BaseException:
        (output_dir / "run.json").unlink()  # run.json says that the report is whole
        raise


def run_facts(run: Run, progress: Progress, pipeline: DDPMPipeline) -> dict[str, Any]:
    """Return the content of run.json: what was trained, on which data, by what."""
    images = run.images
    return {
        "versions": {name: version(name) for name in ("hf_ddpm", "torch", "diffusers", "accelerate")},
        "data": {
            "name": images.name,
            "num_images": images.num_images,
            "num_bad_images": progress.num_bad_images,
            "resolution": to_resolution(images.size),
            "random_crop": run.config.random_crop,
            "channels": images.channels,
            "max_value": images.max_value,
            "value_range": run.config.value_range,
            **_facts_of_values(images),
            "class_names": None if run.classes is None else [*run.classes.names],
            "labels": None if run.labels is None or run.classes is not None else describe_labels(run.labels),
            "fingerprint": images.fingerprint,
            "license": images.license,
            **_facts_of_held_out(run.config),
        },
        "model": {
            "num_parameters": sum(p.numel() for p in pipeline.unet.parameters()),
            "abar_T": float(run.scheduler.alpha_bar[-1]),
        },
        "training": {
            "steps": progress.step,
            "total_steps": progress.step + num_steps_left(run, progress),
            "is_finished": progress.images >= run.total_images,
            "images": progress.images,
            "seconds": round(progress.seconds, 1),
            "num_resumes": progress.num_resumes,
            "num_bad_steps": progress.num_bad_steps,
            "global_batch_size": run.global_batch_size,
            "has_own_objective": run.loss is not run.objective,
            "num_processes": run.processes.size,
            "mixed_precision": run.config.mixed_precision,
            "compile": run.config.compile,
            "device": device_name(run.device),
        },
        "samples": preview_settings(run),
        "figures": _facts_of_figures(run, progress),
    }


def _facts_of_held_out(config: TrainingConfig) -> dict[str, Any]:
    if config.eval_fraction is None:
        return {}
    parts = divide_training(config)
    counts = {"num_images": len(parts.held_out), "num_groups": parts.num_groups, "group_column": config.group_column}
    return {"held_out": {"split": HELD_OUT_SPLIT, **counts}}


def _facts_of_values(images: Any) -> dict[str, Any]:
    """Return what run.json says of the values of arrays; the values of a stream that are clipped are not known."""
    if images.value_range is None:
        return {}
    num_clipped = images.num_clipped if isinstance(images, ImageCache) else None
    return {"values": str(images.value_range), "num_clipped": num_clipped}


def _facts_of_figures(run: Run, progress: Progress) -> dict[str, Any]:
    if not (run.output_dir / "figures/reverse.png").is_file() or not run.config.save_figures:
        return {}
    return {"reverse_chain_steps": reverse_chain_steps(run, progress.images)}


def reverse_chain_steps(run: Run, num_images: int) -> int:
    """Return the number of sampling steps in the figure of the reverse chain: all T, or as many as the run can spare.

    A model that is tuned for few steps has no such chain. A step denoiser is its chain: it gets all T steps, or 0 and
    no figure. Counts decide, and not the clock, so that a resumed run draws the same figure.

    Args:
        run: The run.
        num_images: The images that it has seen when the figure is drawn.
    """
    num_steps = max(CHAIN_SHARE * num_images / run.global_batch_size, CHAIN_STEPS)
    spared = int(num_steps * passes_of_a_step(run))
    if run.config.tuned_steps is not None:
        return 0
    if run.config.prediction_type == "previous_sample" and spared < len(run.scheduler):
        return 0
    return min(len(run.scheduler), spared)


def passes_of_a_step(run: Run) -> float:
    """Return how many forward passes of the reverse chain at least take as long as a training step.

    A training step takes as long as three forward passes of its images, since a backward pass takes two. A pass of
    fewer images may take as long on a GPU; one of more images takes longer everywhere.
    """
    config = run.config
    return 3 * config.gradient_accumulation_steps * min(1.0, config.batch_size / CHAIN_SIZE)


def _draw_figures(run: Run, progress: Progress, pipeline: DDPMPipeline) -> None:
    """Draw the loss and both Markov chains, and say what they take."""
    total, num_steps = len(run.scheduler), reverse_chain_steps(run, progress.images)
    chain = f"{CHAIN_SIZE} samples in {num_steps:,} of {total:,} sampling steps"
    if run.config.tuned_steps is not None:
        chain = "the forward chain"
    elif not num_steps:
        chain = f"no samples, as {total:,} sampling steps would take longer than {CHAIN_SHARE:.0%} of the run's steps"
    print_once(run.processes, f"figures are drawn: the loss, and {chain} (--no_save_figures leaves them out)")
    _draw_loss(run.output_dir)
    _draw_forward_chain(run)
    if num_steps:
        with sharding.autocast(run.device, run.config.mixed_precision):
            _draw_reverse_chain(run, pipeline, num_steps)


def _draw_loss(output_dir: Path) -> None:
    """Draw the logged losses and their mean."""
    plots.draw_curves(
        output_dir / "figures" / "loss.png",
        plots.loss_curves(read_metrics(output_dir / "metrics.jsonl")),
        title="Training loss",
        x_label="optimizer step",
        y_label="loss\n(lower is better)",
        log_y=True,
    )


def _draw_forward_chain(run: Run) -> None:
    """Draw a training image that is carried through the Markov chain."""
    images = run.images
    scheduler = run.scheduler
    x_0 = to_x_0(as_tensor(np.array(center_crop(images.image(0), images.size))), images.scale)
    timesteps = figures.spread(len(scheduler), figures.NUM_STRIP_COLUMNS - 1)
    chain = figures.forward_chain(x_0, scheduler, [-1, *timesteps], torch.Generator().manual_seed(0))
    labels = ["x_0", *(f"t = {t}" for t in timesteps)]
    figures.strip([figures.to_pil(pictured(chain / 2 + 0.5, images.value_range))], labels).save(
        run.output_dir / "figures" / "forward.png"
    )


def _draw_reverse_chain(run: Run, pipeline: DDPMPipeline, total: int) -> None:
    """Draw samples that emerge in `total` steps: x_t and x_0_hat as a strip, x_t as an animation."""
    columns = [total - 1 - t for t in reversed(figures.spread(total, figures.NUM_STRIP_COLUMNS - 1))]
    frames = sorted({*figures.spread(total, NUM_GIF_FRAMES), *columns})
    pipeline.set_progress_bar_config(desc="reverse chain", leave=False)
    pairs = None if run.condition is None else example_pairs(run.condition, run.images, CHAIN_SIZE)
    number_or_images: dict[str, Any] = {"batch_size": CHAIN_SIZE} if pairs is None else {"image": pairs.conditions}
    final, trajectory = pipeline(
        **number_or_images,
        generator=seeded_generators(range(CHAIN_SIZE), pipeline.device),
        timesteps=figures.spread(len(pipeline.scheduler), total)[::-1],
        output_type="pt",
        class_labels=labels_in_turn(run.labels, range(CHAIN_SIZE)) if pairs is None else pairs.labels,
        trajectory=frames,
        return_dict=False,
    )
    pipeline.set_progress_bar_config()  # `train` returns this pipeline
    shown = partial(pictured, values=run.images.value_range)
    final = shown(2 * final.cpu() - 1)
    states = (replace(step, x_t=shown(step.x_t), x_0_hat=shown(step.x_0_hat)) for step in trajectory)
    steps = dict(zip(frames, states, strict=True))
    strip = figures.reverse_strip([steps[k] for k in columns], final)
    strip.save(run.output_dir / "figures" / "reverse.png")
    frames_and_end = [*(step.x_t for step in steps.values()), final]
    pictures = [figures.grid(figures.to_pil(x / 2 + 0.5), columns=CHAIN_SIZE) for x in frames_and_end]
    figures.chain_gif(pictures, run.output_dir / "figures" / "reverse.gif")
