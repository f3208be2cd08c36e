"""Train on Gaussian random fields of a known spectrum, and compare the spectrum of samples with it.

    python -m benchmarks.random_fields.run --machine NAME

A field is white noise whose Fourier transform is multiplied by |k|^(-3/2), so that its power is ~ |k|^-3; it has no
mean, and is divided by the standard deviation of all fields. The run writes 4,096 fields of 16x16 float32 into a .npy
file, trains a small network on them as any user would, and measures 1,024 samples by
`hf-ddpm evaluate --metrics values`. The table compares, at each wave number k, the mean power of samples with that
which the fields have by construction; the error is the standard error of the mean over the samples. A network that is
exact for such fields is sampled in as many steps, to tell what the solver's steps alone lose.

Appends a row to `rows.jsonl`, and writes `table.md` and `spectrum.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ddpm import DDPMScheduler, evaluate, load_config, train
from hf_ddpm.evaluation.value_statistics import spectrum_rows, value_statistics
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.timesteps import set_timesteps, timesteps_even_in_log_sigma

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
# So many fields tell the true power at each wave number to within 0.2 %, and so many the exact network's to 0.5 %.
NUM_TRUE_FIELDS, NUM_EXACT = 100_000, 10_000


def random_fields(count: int, seed: int) -> np.ndarray:
    """Return Gaussian random fields, (count, SIDE, SIDE) float64, before they are divided by their deviation."""
    noise = np.random.default_rng(seed).standard_normal((count, SIDE, SIDE))
    return np.fft.ifft2(np.fft.fft2(noise) * amplitudes()).real


def amplitudes() -> np.ndarray:
    """Return what the Fourier transform of white noise is multiplied by, (SIDE, SIDE)."""
    frequencies = np.fft.fftfreq(SIDE) * SIDE
    radius = np.hypot(frequencies[:, None], frequencies[None])
    return np.where(radius > 0, np.maximum(radius, 1) ** (-SLOPE / 2), 0)


def true_spectrum(deviation: float) -> list[float]:
    """Return the power of the fields at each wave number, from many more of them than the model sees."""
    parts = [random_fields(10_000, seed) / deviation for seed in range(1, NUM_TRUE_FIELDS // 10_000 + 1)]
    powers = [spectrum_rows(value_statistics(torch.from_numpy(part)[:, None]))["spectrum"][0] for part in parts]
    return np.mean(powers, axis=0).tolist()


def exact_spectrum(num_steps: int, even_in: str, deviation: float, fields: np.ndarray) -> list[float]:
    """Return the power of samples of a network that knows the distribution of the fields.

    Args:
        num_steps: The steps of UniPC.
        even_in: `t`, or `log sigma`, as models of arrays are sampled.
        deviation: What the fields are divided by.
        fields: The fields of training, whose range becomes [-1, 1].
    """
    half_range = float(fields.max() - fields.min()) / 2
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="sample")
    solver = named_scheduler("unipc", ddpm.config, num_steps)
    solver.set_timesteps(num_steps)
    if even_in == "log sigma":
        set_timesteps(solver, timesteps_even_in_log_sigma(ddpm.alpha_bar.tolist(), num_steps))
    power = torch.from_numpy(amplitudes() / half_range).square()
    x_t = torch.randn(NUM_EXACT, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for t in solver.timesteps:
        alpha_bar = float(ddpm.alpha_bar[int(t)])
        gain = math.sqrt(alpha_bar) * power / (alpha_bar * power + 1 - alpha_bar)
        x_0_hat = torch.fft.ifft2(torch.fft.fft2(x_t.double()) * gain).real.float()
        x_t = solver.step(x_0_hat, t, x_t).prev_sample
    return spectrum_rows(value_statistics(x_t.double() * half_range / deviation))["spectrum"][0]


def main() -> None:
    """Train, sample, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    parser.add_argument("--steps", type=int, default=1000, help="The optimizer steps of 64 fields.")
    parser.add_argument("--noise_level_mean", type=float, default=-0.4, help="As in `hf-ddpm train`.")
    parser.add_argument("--noise_level_std", type=float, default=1.2, help="As in `hf-ddpm train`.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="The steps of UniPC.")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"], help="The arithmetic of training.")
    parser.add_argument("--compile", action="store_true", help="Compile the network.")
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
                mixed_precision=options.mixed_precision,
                compile=options.compile,
                cpu_threads_per_process=1,
                eval_batch_size=4,
                save_figures=False,
            )
        )
        settings: dict[str, Any] = {"metrics": ("values",), "num_images": NUM_SAMPLES}
        num_steps = options.num_inference_steps
        (result,) = evaluate(folder / "run", **settings, num_inference_steps=[num_steps])["results"]
        shutil.copyfile(folder / "run/figures/spectrum.png", FOLDER / "spectrum.png")
        row = {
            "machine": options.machine,
            "steps": options.steps,
            "seconds": read_run(folder / "run")["training"]["seconds"],
            "noise_level": [options.noise_level_mean, options.noise_level_std],
            "mixed_precision": options.mixed_precision,
            "value": result["value"],
            "real": result["real_vs_real"]["value"],
            "sampling": [result["sampling"][key] for key in ("scheduler", "num_inference_steps")],
            "true": true_spectrum(deviation),
            "exact": {each: exact_spectrum(num_steps, each, deviation, fields) for each in ("t", "log sigma")},
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
    mean, std = row.get("noise_level", [-0.4, 1.2])
    exact = row.get("exact", {})
    summary = (
        f"{NUM_SAMPLES:,} samples in {steps} steps of {scheduler}, even in {'log sigma' if exact else 't'}, after "
        f"{row['steps']:,} training steps of 64 fields (mixed precision: {row.get('mixed_precision', 'no')}; noise "
        f"levels: {mean:g}, {std:g}) in {row['seconds'] / 60:.1f} minutes on {row['machine']} (torch "
        f"{row['versions']['torch']}). The Fréchet distance of values is {row['value']:.3g}; halves of the data have "
        f"{row['real']:.3g}."
    )
    titles = ["k", "power of the fields", "power of samples", "difference", "in standard errors"]
    titles += [f"exact network, even in {each}" for each in exact]
    lines = [summary, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for k, true in enumerate(row["true"]):
        power, error = row["spectrum"][k], row["spectrum_standard_error"][k]
        cells = [k + 1, f"{true:.4g}", f"{power:.4g} ± {error:.2g}", f"{power / true - 1:+.1%}"]
        cells += [f"{(power - true) / error:+.1f}", *(f"{powers[k] / true - 1:+.1%}" for powers in exact.values())]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
