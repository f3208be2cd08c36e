"""Folders of runs with all that a model card can show, and functions that read cards."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm.hub.card import write_card
from hf_ddpm.training.config import TrainingConfig

SEED = 1001


TOKEN = "hf_" + "secretsecret"


_TRAINING = TrainingConfig(
    dataset_name="someone/pictures", hub_model_id="me/photos", ddpm_num_steps=500, output_dir="runs/photos"
)
# What config.yaml holds.
CONFIG = {name: value for name, value in asdict(_TRAINING).items() if name != "hub_token"}
CONFIG["learning_rate"] = _TRAINING.peak_learning_rate

RUN = {
    "versions": {"hf_ddpm": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "accelerate": "1.15.0"},
    "data": {
        "name": "someone/pictures",
        "num_images": 1797,
        "num_bad_images": 3,
        "resolution": 24,
        "channels": 3,
        "class_names": None,
        "fingerprint": "ab" * 32,
        "license": "CC BY 4.0",
    },
    "model": {"num_parameters": 1234567, "abar_T": 2.5e-05},
    "training": {
        "steps": 5432,
        "images": 173824,
        "seconds": 4321.5,
        "num_processes": 2,
        "global_batch_size": 33,
        "device": "AMD EPYC (2 cores)",
        "mixed_precision": "bf16",
        "num_resumes": 7,
    },
    "samples": {"scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 19, "seed": SEED, "ema": True},
}


SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 500,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
}


UNET = {"_class_name": "UNet2DModel", "sample_size": 24, "in_channels": 3, "num_class_embeds": None, "dropout": 0.0}


FIGURES = ("samples.png", "loss.png", "forward.png", "reverse.png", "reverse.gif")


RESULT = {
    "metric": "kid",
    "name": "KID",
    "value": 0.0123456789,
    "standard_error": 0.00123,
    "num_compared": [5000, 10000],
    "real_vs_real": {
        "value": 0.0001,
        "standard_error": None,
        "num_compared": [4000, 4000],
        "of": "test against train",
    },
    "network": {"network": "inception", "input_size": 299, "weights_sha256": "cd" * 32},
    "reference": {"name": "some|one", "config": None, "split": "train", "count": 60000, "fingerprint": "ef" * 32},
    "sampling": {"scheduler": "ddim", "num_inference_steps": 50, "seed": 7},
    "command": "hf-ddpm evaluate photos",
}


COPIES = RESULT | {"metric": "memorization_pixels", "name": "Near", "remark": "so many"}


HAND_WRITTEN = """---
license: mit
tags:
- mine
model-index:
- name: theirs
  results:
  - task:
      type: unconditional-image-generation
    dataset:
      type: cifar10
      name: CIFAR-10
    metrics:
    - type: fid
      value: 3.17
---

# Clothes

I made this on a rainy day.
"""


def make_run(folder: Path, config=CONFIG, run=RUN, scheduler=SCHEDULER, unet=UNET, figures=FIGURES) -> Path:
    for name in ("unet", "scheduler", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "unet/config.json").write_text(json.dumps(unet))
    (folder / "model_index.json").write_text("{}")
    for name in figures:
        (folder / "figures" / name).write_bytes(b"")
    lines = [{"step": 10 * i, "loss": 1 / i, "images_per_second": 90.0 + i} for i in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "lo')
    return folder


def card_of(folder: Path, **parts: Any) -> str:
    return write_card(make_run(folder, **parts)).read_text(encoding="utf-8")


def write_results(folder: Path, *results: dict[str, Any], weights: str = "") -> None:
    (folder / "evaluation.json").write_text(json.dumps({"weights_sha256": weights, "results": results}))


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.S)


def imported(code: str) -> set[str]:
    """Return the names of the modules that a piece of code imports."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {getattr(node, "module", None) or node.names[0].name for node in nodes}


def numbers(value: Any) -> list[str]:
    """Return the numbers in a record, as the card writes them."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [f"{value:,}" if isinstance(value, int) and value != SEED else f"{value:.4g}"]


def count(number: str, card: str) -> int:
    """Return how often a number stands on a card, alone and not within another number."""
    return len(re.findall(rf"(?<![\d,.]){re.escape(number)}(?![\d,]*\d)", card))


def assert_no_trace_of_absence(card: str) -> None:
    """Check that what is missing on a card left no gap, no None and no uneven table."""
    assert not re.search(r"None|Undefined|nan\b|\{\{|\{%|\n\n\n|  ,| \.(?!\.)|[^\n]\n## ", card)
    for table in re.findall(r"(?:^\|.*\n)+", card, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
