"""Training state on disk: `output_dir/checkpoint-N` after step N, written by Accelerate.

    model.safetensors, optimizer.bin, random_states_*.pkl    Accelerate's `save_state`
    unet_ema/                                                the averaged weights, as diffusers saves a model
    progress.json                                            Progress

What the rest of a run depends on besides these, the order of images and all randomness, is a function of (seed, images
seen), so that a resumed run is the run that was not stopped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import UNet2DModel

from hf_ddpm.config import UsageError, checkpoint_names
from hf_ddpm.ema import EMA

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what it must not change when it goes on.

    Args:
        step: optimizer steps done.
        seconds: spent in them, over all starts.
        num_resumes: starts after the first.
        global_batch_size: images per step.
        data_fingerprint: of the images.
    """

    step: int
    seconds: float
    num_resumes: int
    global_batch_size: int
    data_fingerprint: str


def save_checkpoint(
    accelerator: Accelerator, ema: EMA | None, progress: Progress, output_dir: Path, total_limit: int | None
) -> None:
    """Writes `checkpoint-N` under a temporary name, renames it, and deletes the oldest above `total_limit`."""
    target = output_dir / f"checkpoint-{progress.step}"
    partial = output_dir / f"partial-{target.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        if ema is not None:
            ema.module.save_pretrained(partial / "unet_ema")  # pyright: ignore[reportCallIssue]
        (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # The same step is saved again by a run that was resumed from an earlier checkpoint.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        if total_limit is not None:
            for old in _checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder of checkpoint `name`, or of the newest for `latest`; whether it is there was checked before."""
    return _checkpoints(output_dir)[-1] if name == "latest" else output_dir / Path(name).name


def load_checkpoint(accelerator: Accelerator, ema: EMA | None, checkpoint: Path, expected: Progress) -> Progress:
    """Restores model, optimizer and average in place and returns where the run is.

    Raises:
        UsageError: the checkpoint is of other data, of another global batch, or without the average that is wanted.
    """
    if not (checkpoint / "progress.json").is_file():
        raise UsageError(f"{checkpoint.name} is not a checkpoint of hf_ddpm: it has no progress.json")
    progress = read_progress(checkpoint)
    if progress.data_fingerprint != expected.data_fingerprint:
        raise UsageError(
            f"{checkpoint.name} was trained on other images (fingerprint {progress.data_fingerprint[:12]}, "
            f"here {expected.data_fingerprint[:12]}): give the data set and settings of its config.yaml"
        )
    if progress.global_batch_size != expected.global_batch_size:
        raise UsageError(
            f"{checkpoint.name} was trained with {progress.global_batch_size} images per step, "
            f"here {expected.global_batch_size}: choose train_batch_size and gradient_accumulation_steps so that, "
            "times the number of processes, they give the same"
        )
    if ema is not None and not (checkpoint / "unet_ema").is_dir():
        raise UsageError(f"{checkpoint.name} holds no averaged weights: go on with --no_use_ema")
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        averaged = UNet2DModel.from_pretrained(checkpoint / "unet_ema")
        ema.load_state_dict(averaged.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
    return replace(progress, num_resumes=progress.num_resumes + 1)


def read_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def _checkpoints(output_dir: Path) -> list[Path]:
    return [output_dir / name for name in checkpoint_names(output_dir)]
