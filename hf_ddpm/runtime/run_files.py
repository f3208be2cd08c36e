"""The folder of a run: what is in it, and whether a run may begin or go on in it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from hf_ddpm.training.config import TrainingConfig


# Of `hf-ddpm evaluate`: results and pictures of the weights that evaluation.json names.
EVALUATION_PICTURES = ("steps.png", "seconds.png", "bound.png", "memorization.png")


def check_output_dir(config: TrainingConfig) -> None:
    """Raises UsageError if `output_dir` holds another run, or there is nothing to resume from."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir must be a folder, got {config.output_dir!r}, which is a file")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        raise UsageError(f"output_dir must be a folder that can be written, got {config.output_dir!r}: see {existing}")
    checkpoints = checkpoint_names(folder)
    wanted = config.resume_from_checkpoint
    if wanted is not None:
        if config.overwrite_output_dir:
            raise UsageError("overwrite_output_dir would delete the checkpoint to resume from: give one of the two")
        if not checkpoints and (folder / "run.json").exists():
            raise UsageError(
                f"resume_from_checkpoint = {wanted!r}, but {config.output_dir!r} holds a finished run without "
                "checkpoints: choose another folder, or --overwrite_output_dir to delete it"
            )
        if not checkpoints and not (folder / "config.yaml").is_file() and run_files(folder):
            raise UsageError(
                f"resume_from_checkpoint = {wanted!r}, but {config.output_dir!r} holds a model of no run that could "
                "go on, and a new one would replace it: choose another folder, or --overwrite_output_dir instead"
            )
        if checkpoints and not (folder / "config.yaml").is_file():
            raise UsageError(f"resume_from_checkpoint = {wanted!r}, but {config.output_dir!r} holds no config.yaml")
        if wanted != "latest" and Path(wanted).name not in checkpoints:
            names = " or ".join(["latest", *checkpoints])
            raise UsageError(f"resume_from_checkpoint must be {names}, got {wanted!r}")
        if wanted != "latest" and Path(wanted).name != checkpoints[-1]:
            raise UsageError(
                f"resuming from {wanted!r} would leave {checkpoints[-1]}, of another course of the run, the latest: "
                "move the newer checkpoints away first"
            )
    elif not config.overwrite_output_dir and not config.dry_run and run_files(folder):
        raise UsageError(
            f"output_dir {config.output_dir!r} already holds a run: choose another, "
            "--resume_from_checkpoint latest to go on with it, or --overwrite_output_dir to delete it"
        )


def checkpoint_names(folder: Path) -> list[str]:
    """`checkpoint-N` of the run in `folder`, N rising; other names are not a run's."""
    names = [p.name for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def previews(folder: Path) -> list[tuple[int, Path]]:
    """The previews of the run in `folder` with their steps, rising; other pictures are not a run's."""
    found = [(re.fullmatch(r"step-(\d+)\.png", p.name), p) for p in folder.glob("previews/step-*.png")]
    return sorted((int(match[1]), path) for match, path in found if match)


def run_files(folder: Path) -> list[Path]:
    """What the run in `folder` wrote; nothing if there is no run, so that files of others are safe."""
    checkpoints = [folder / name for name in checkpoint_names(folder)]
    if not checkpoints and not any((folder / name).exists() for name in ("config.yaml", "model_index.json")):
        return []
    patterns = (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "eval.jsonl",
        "evaluation.json",
        "best",
        "README.md",
        "model_index.json",
        "unet",
        "scheduler",
    )
    pictures = (
        "figures/samples.png",
        "figures/loss.png",
        "figures/kid.png",
        "figures/val_loss.png",
        "figures/forward.png",
        "figures/reverse.*",
        *(f"figures/{name}" for name in EVALUATION_PICTURES),
        "ema/halflife-*",
        "ema/std-*",
        "ema/snapshot-*.safetensors",
    )
    partial = [p for p in folder.glob("partial-*") if p.is_dir()]
    pngs = [path for _, path in previews(folder)]
    return [
        *checkpoints,
        *partial,
        *pngs,
        *(path for pattern in (*patterns, *pictures) for path in folder.glob(pattern)),
    ]
