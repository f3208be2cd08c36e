"""Steps without finite loss and gradients: they are counted and named, and too many of them end a run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from hf_ddpm.runtime.errors import RunError
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loader import image_names
from hf_ddpm.training.loop_state import LoopState, StepResult
from hf_ddpm.training.run import Run, print_once, send_alert

MAX_NAMED_IMAGES = 3


def count_skipped_steps(run: Run, progress: Progress, state: LoopState) -> Progress:
    """Count the skipped ones of the steps that were not read yet. This waits for the device.

    Raises:
        RunError: `max_bad_steps` in a row were skipped.
    """
    unread, state.unread = state.unread, []
    flags = torch.stack([result.is_bad for result in unread]).tolist() if unread else []
    for result, is_bad in zip(unread, flags, strict=True):
        if not is_bad:
            progress = replace(progress, bad_steps_in_a_row=0, bad_steps_began="")
            continue
        in_a_row, began = progress.bad_steps_in_a_row + 1, progress.bad_steps_began
        if in_a_row == 1:
            began = f"step {result.step}: {describe_bad_images(run, result)}"
            text = f"a step is skipped, its loss or gradients are not finite: {began}"
            print_once(run.processes, text)
            send_alert(run, "a step is skipped", text)
        if in_a_row >= run.config.max_bad_steps:
            saved = f"The last checkpoint is checkpoint-{state.saved_step}"
            raise RunError(
                f"{in_a_row} steps in a row had no finite loss and gradients (max_bad_steps). They began at {began}. "
                f"{saved if state.saved_step else 'There is no checkpoint yet'}. "
                f"Look at these images, or change a setting in config.yaml: {_settings_to_change(run.config)}"
            )
        progress = replace(
            progress,
            num_bad_steps=progress.num_bad_steps + 1,
            bad_steps_in_a_row=in_a_row,
            bad_steps_began=began,
        )
    return progress


def require_finite_end(config: TrainingConfig, progress: Progress) -> None:
    """Check that the end of a run is not made of skipped steps; a single last one is none that fails it.

    Raises:
        RunError: The run learned nothing in its last steps.
    """
    skipped = progress.bad_steps_in_a_row
    if skipped >= 2 or skipped == progress.step > 0:
        raise RunError(
            f"the last {skipped} of {progress.step} steps had no finite loss and gradients: the run has "
            f"failed. They began at {progress.bad_steps_began}. Look at these images, or train again with "
            f"{_settings_to_change(config)}"
        )


def _settings_to_change(config: TrainingConfig) -> str:
    """Return which settings of a run may make its gradients infinite or NaN, and what to give instead."""
    settings = ["a lower learning_rate"]
    if config.mixed_precision not in (None, "no"):
        settings.append("mixed_precision no")
    if config.compile:  # compilers have their own faults
        settings.append("compile false")
    return " or ".join(settings)


def describe_bad_images(run: Run, result: StepResult) -> str:
    """Name the images of a step whose loss is not finite, each with its noise level; all processes call it."""
    own_images = [
        {"loss": loss, "t": t, "position": position}
        for losses, timesteps, positions in result.evaluated
        for loss, t, position in zip(losses.tolist(), timesteps.tolist(), positions.tolist(), strict=True)
    ]
    images = [image for part in run.processes.gather(lambda: own_images) for image in part]
    suspects = [image for image in images if not math.isfinite(image["loss"])]
    heading = ""
    if not suspects:
        suspects = sorted(images, key=lambda image: -image["loss"])[:1]
        heading = "every loss is finite, a gradient is not; the largest loss: "
    named = suspects[:MAX_NAMED_IMAGES]
    names = run.processes.on_main(lambda: image_names(run, [image["position"] for image in named]))
    texts = [f"{name} at t = {image['t']}, loss {image['loss']:g}" for name, image in zip(names, named, strict=True)]
    num_more = len(suspects) - len(named)
    return heading + "; ".join(texts) + (f"; and {num_more} more" if num_more else "")
