"""Evaluations of a small model of digits: its data, and what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from hf_ddpm.training.config import TrainingConfig

DISTANCES = {"fd", "kid", "precision", "recall", "density", "coverage"}
ALL_METRICS = ("fd", "kid", "precision", "nll", "memorization")


def config_of(digits: Path, **settings: Any) -> TrainingConfig:
    """Return the settings of a run on a folder of digits, with a cache beside the folder."""
    return TrainingConfig(dataset_name=str(digits), cache_dir=str(digits.parent / "cache"), **settings)


def results_in(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "evaluation.json").read_text())["results"]


def by_metric(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in results}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def labeled_folder(root: Path, classes: dict[str, list[int]], digits: Path) -> Path:
    """Save a data set whose images of a split have these classes, up to "even", "odd" and "other"."""
    parts = {}
    names = datasets.ClassLabel(names=["even", "odd", "other"][: max(max(labels) for labels in classes.values()) + 1])
    for split, labels in classes.items():
        paths = sorted((digits / split).iterdir())[: len(labels)]
        data = datasets.Dataset.from_dict({"image": [str(p) for p in paths], "kind": labels})
        parts[split] = data.cast_column("image", datasets.Image()).cast_column("kind", names)
    datasets.DatasetDict(parts).save_to_disk(root)
    return root
