"""Train on Gaussian random fields of a known spectrum, and compare the spectrum of samples with it.

    python -m benchmarks.random_fields.run --machine NAME

A field is white noise whose Fourier transform is multiplied by |k|^(-3/2), so that its power is ~ |k|^-3; it has no
mean, and is divided by the standard deviation of all fields. The run writes 4,096 fields of 16x16 float32 into a .npy
file, trains a small network on them as any user would, and measures 1,024 samples by
`hf-ddpm evaluate --metrics values`. The table compares, at each wave number k, the mean power of samples with that
which the fields have by construction; the error is the standard error of the mean over the samples.

Appends a row to `rows.jsonl`, and writes `table.md` and `spectrum.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ddpm import evaluate, load_config, train
from hf_ddpm.evaluation.value_statistics import spectrum_rows, value_statistics
from hf_ddpm.runtime.run_files import read_run

FOLDER = Path(__file__).parent
SIDE, NUM_FIELDS, NUM_SAMPLES, SLOPE = 16, 4096, 1024, 3
# A small one, of two levels, for a few minutes on one core.
NETWORK = {
    "sample_size": SIDE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
# So many fields tell the true power at each wave number to within 0.2 %.
NUM_TRUE_FIELDS = 100_000


def random_fields(count: int, seed: int) -> np.ndarray:
    """Return Gaussian random fields, (count, SIDE, SIDE) float64, before they are divided by their deviation."""
    frequencies = np.fft.fftfreq(SIDE) * SIDE
    radius = np.hypot(frequencies[:, None], frequencies[None])
    amplitude = np.where(radius > 0, np.maximum(radius, 1) ** (-SLOPE / 2), 0)
    noise = np.random.default_rng(seed).standard_normal((count, SIDE, SIDE))
    return np.fft.ifft2(np.fft.fft2(noise) * amplitude).real


def true_spectrum(deviation: float) -> list[float]:
    """Return the power of the fields at each wave number, from many more of them than the model sees."""
    parts = [random_fields(10_000, seed) / deviation for seed in range(1, NUM_TRUE_FIELDS // 10_000 + 1)]
    powers = [spectrum_rows(value_statistics(torch.from_numpy(part)[:, None]))["spectrum"][0] for part in parts]
    return np.mean(powers, axis=0).tolist()


def main() -> None:
    """Train, sample, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    parser.add_argument("--steps", type=int, default=1000, help="The optimizer steps of 64 fields.")
    parser.add_argument("--noise_level_mean", type=float, default=-0.4, help="As in `hf-ddpm train`.")
    parser.add_argument("--noise_level_std", type=float, default=1.2, help="As in `hf-ddpm train`.")
    parser.add_argument("--inference_steps", type=int, default=20, help="The steps of a sample.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = random_fields(NUM_FIELDS, seed=0)
        deviation = float(fields.std())
        (folder / "fields").mkdir()
        np.save(folder / "fields" / "all.npy", (fields / deviation).astype(np.float32))
        (folder / "unet.json").write_text(json.dumps(NETWORK))
        train(
            load_config(
                model_config_name_or_path=str(folder / "unet.json"),
                train_data_dir=str(folder / "fields"),
                stack_axis=0,
                output_dir=str(folder / "run"),
                cache_dir=str(folder / "cache"),
                train_batch_size=64,
                max_train_steps=options.steps,
                noise_level_mean=options.noise_level_mean,
                noise_level_std=options.noise_level_std,
                cpu_threads_per_process=1,
                eval_batch_size=4,
                save_figures=False,
            )
        )
        settings: dict[str, Any] = {"metrics": ("values",), "num_images": NUM_SAMPLES}
        (result,) = evaluate(folder / "run", **settings)["results"]
        shutil.copyfile(folder / "run/figures/spectrum.png", FOLDER / "spectrum.png")
        row = {
            "machine": options.machine,
            "steps": options.steps,
            "seconds": read_run(folder / "run")["training"]["seconds"],
            "value": result["value"],
            "real": result["real_vs_real"]["value"],
            "sampling": [result["sampling"][key] for key in ("scheduler", "num_inference_steps")],
            "true": true_spectrum(deviation),
            **{key: result["spectra"]["samples"][key][0] for key in ("spectrum", "spectrum_standard_error")},
            "versions": {package: version(package) for package in ("torch", "diffusers")},
        }
    with open(FOLDER / "rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()]
    (FOLDER / "table.md").write_text("\n\n".join(["# Gaussian random fields", *map(describe, rows)]) + "\n")


def describe(row: dict[str, Any]) -> str:
    """Return the table of a run."""
    scheduler, steps = row["sampling"]
    summary = (
        f"{NUM_SAMPLES:,} samples in {steps} steps of {scheduler}, after {row['steps']:,} training steps in "
        f"{row['seconds'] / 60:.1f} minutes on {row['machine']} (torch {row['versions']['torch']}). The Fréchet "
        f"distance of values is {row['value']:.3g}; halves of the data have {row['real']:.3g}."
    )
    lines = [
        summary,
        "",
        "| k | power of the fields | power of samples | difference | in standard errors |",
        "|---|---|---|---|---|",
    ]
    for k, columns in enumerate(zip(row["true"], row["spectrum"], row["spectrum_standard_error"], strict=True), 1):
        true, power, error = columns
        deviation = (power - true) / error
        lines.append(f"| {k} | {true:.4g} | {power:.4g} ± {error:.2g} | {power / true - 1:+.1%} | {deviation:+.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
