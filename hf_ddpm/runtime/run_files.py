"""The folder of a run: what is in it, and whether a run may begin or go on in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


# Of `hf-ddpm evaluate`: results and pictures of the weights that evaluation.json names.
EVALUATION_PICTURES = ("steps.png", "seconds.png", "bound.png", "memorization.png")


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
