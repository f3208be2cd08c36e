"""The curves of a run's validation, of the lines in eval.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_ddpm.plots import Curve, Level, draw_curves


def draw_validation_curves(records: list[dict[str, Any]], folder: Path) -> None:
    """Draw what was validated over the images seen.

    These are `kid.png`, `val_loss.png`, `psnr.png`, `training_distance.png` and `training_share.png` in `folder`.

    Args:
        records: The lines of eval.jsonl. A picture without a value is not drawn.
    """
    _draw_memorization(records, folder)
    for name, title, y_label, better in (
        ("kid", "Distance of samples to held-out images", "kernel distance", "lower"),
        ("val_loss", "Loss on held-out images", "mean loss over all t", "lower"),
        ("psnr", "PSNR of samples", "PSNR in dB", "higher"),
    ):
        measured = [record for record in records if record.get(name) is not None]
        if not measured:
            continue
        errors = [record.get(f"{name}_standard_error") for record in measured]
        draw_curves(
            folder / f"{name}.png",
            [
                Curve(
                    y_label,
                    [record["images"] for record in measured],
                    [record[name] for record in measured],
                    [math.nan if error is None else error for error in errors],
                )
            ],
            title=title,
            x_label="training images seen",
            y_label=f"{y_label}\n({better} is better)",
            y_from_zero=name == "kid",
        )


def _draw_memorization(records: list[dict[str, Any]], folder: Path) -> None:
    measured = [record for record in records if "training_share" in record]
    if not measured:
        return
    x = [record["images"] for record in measured]

    def curve(label: str, name: str) -> Curve:
        return Curve(label, x, [record[name] for record in measured])

    draw_curves(
        folder / "training_distance.png",
        [
            curve("samples to training images", "training_distance"),
            curve("samples to held-out images", "held_out_distance"),
        ],
        title="Distance to the nearest image",
        x_label="training images seen",
        y_label="median distance of pixels",
        y_from_zero=True,
        level=Level("held-out images to training images", measured[-1]["real_distance"]),
    )
    draw_curves(
        folder / "training_share.png",
        [
            curve("nearest image is a training image", "training_share"),
            curve("copies of a training image", "copied_share"),
        ],
        title="Memorization",
        x_label="training images seen",
        y_label="share of samples",
        y_from_zero=True,
        level=Level("nearest, by chance", measured[-1]["training_share_by_chance"]),
    )
