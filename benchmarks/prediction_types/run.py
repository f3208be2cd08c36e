"""Train the digits with each prediction type and with a learned variance, and show samples of all five.

    python -m benchmarks.prediction_types.run [--runs FOLDER]

Trains the recipe `digits` five ways, samples each model by its full chain, and writes `samples.png` and `table.md`.
The runs stay in FOLDER if one is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from hf_ddpm import DDPMPipeline
from hf_ddpm.figures import strip, to_pil
from hf_ddpm.training.loop import train
from hf_ddpm.training.parsing import load_config

HERE = Path(__file__).parent
NUM_IMAGES = 12
VARIANTS = {
    "epsilon": {"prediction_type": "epsilon"},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "previous_sample": {"prediction_type": "previous_sample", "ddpm_num_steps": 50, "loss_weighting": "min_snr"},
    "learned_range": {"prediction_type": "v_prediction", "variance_type": "learned_range"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", help="a folder for the runs; default: a temporary one")
    options = parser.parse_args()
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or temporary
        for name, settings in VARIANTS.items():
            output_dir = f"{folder}/{name}"
            train(load_config(recipe="digits", output_dir=output_dir, **settings))
            pipeline = DDPMPipeline.from_pretrained(output_dir)
            images = pipeline(
                batch_size=NUM_IMAGES,
                generator=[torch.Generator().manual_seed(i) for i in range(NUM_IMAGES)],
                output_type="pt",
            ).images
            rows.append(to_pil(images))
            run = json.loads(Path(output_dir, "run.json").read_text())
            losses = [json.loads(line)["loss"] for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]
            said = ", ".join(f"{k} {v}" for k, v in settings.items())
            lines.append(
                f"| {name} | {said} | {len(pipeline.scheduler)} | {run['training']['images']:,} | "
                f"{sum(losses[-10:]) / 10:.4f} |"
            )
    strip(rows, [f"seed {i}" for i in range(NUM_IMAGES)], list(VARIANTS)).save(HERE / "samples.png")
    head = (
        f"torch {version('torch')}, diffusers {version('diffusers')}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads. Losses of different targets cannot be compared.\n\n"
        "| model | settings besides the recipe `digits` | T | images seen | mean of the last 10 losses |\n"
        "|---|---|---|---|---|\n"
    )
    (HERE / "table.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
