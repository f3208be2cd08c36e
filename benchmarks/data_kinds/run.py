"""Train a small model of each kind of data that is no set of 8-bit squares, and compare its samples with the data.

    python -m benchmarks.data_kinds.run --machine NAME
    python -m benchmarks.data_kinds.run fields complex --machine NAME

The kinds are made by numpy, by seed 0, and written into the files that people keep them in:

    colors    48x64 RGB, PNG: discs and squares on gradients
    bands     eight bands of 11 bits, uint16, TIFF: water, soil and plants, each with its spectrum
    fields    float32 with negative values, NumPy: vortices of both signs
    gray      16 bits, PNG: cells with nuclei
    complex   real and imaginary part as two channels, float32, NumPy: wave packets

Each model is trained by `hf-ddpm train`, in a process of its own, sampled as by `hf-ddpm sample`, and measured as by
`hf-ddpm evaluate --metrics values`. A process that cannot import hf_ddpm then samples it by diffusers' own
DDPMPipeline, and the table has the largest difference from `hf_ddpm.DDPMPipeline`, in the units of the data. Replaces
the row of each kind in `rows.jsonl`, and writes `table.md` and, for each kind, `KIND.png`, data above samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from matplotlib import colormaps
from PIL import Image

from hf_ddpm import DDPMPipeline, evaluate
from hf_ddpm.figures import grid, png_bytes, to_pil, with_row_titles
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.value_range import ValueRange, pictured

FOLDER = Path(__file__).parent
SIDE, COLORS_SIZE = 16, (48, 64)
NUM_IMAGES, NUM_SAMPLES, NUM_STOCK_SAMPLES = 2048, 128, 4
COLUMNS = 8  # of a picture
COLUMNS_OF_VALUES = (
    *(
        "kind",
        "values",
        "of samples",
        "type",
        "mean, deviation",
        "of samples",
        "correlation",
        "of samples",
        "distance",
    ),
    *("of halves", "stock"),
)
LARGEST_11_BITS, LARGEST_16_BITS = 2047, 65535
# As the recipe of the digits has them, and small previews.
SETTINGS = {
    "lr_warmup_steps": 30,
    "cpu_threads_per_process": 1,
    "stable_target_images": 1024,
    "eval_batch_size": 4,
    "ema_snapshots": 0,
}
# Reflectances of water, soil and plants in the bands of WorldView-2, from coastal blue to the second infrared.
SPECTRA = np.array(
    [
        [0.30, 0.28, 0.22, 0.14, 0.09, 0.06, 0.03, 0.02],
        [0.28, 0.34, 0.44, 0.54, 0.60, 0.64, 0.68, 0.70],
        [0.08, 0.10, 0.22, 0.20, 0.12, 0.48, 0.84, 0.88],
    ]
)
# Samples a pipeline as stock does, with hf_ddpm out of reach.
STOCK = """
import sys
sys.modules["hf_ddpm"] = None  # importing it raises ImportError
import diffusers, numpy, torch
torch.set_num_threads(1)
folder, count, out = sys.argv[1:]
pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
assert type(pipeline.scheduler) is diffusers.DDPMScheduler
generator = torch.Generator().manual_seed(0)
numpy.save(out, pipeline(int(count), generator, num_inference_steps=20, output_type="np").images)
"""


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    Args:
        files: What the table calls its files.
        make: A random generator -> one image, (C, H, W) in the type of the data.
        write: A folder and all images, (N, C, H, W) -> files.
        rows: Images -> titles and rows of a picture.
        settings: The settings of `hf-ddpm train` that the kind needs.
        steps: The optimizer steps.
        batch: The images of a step.
        widths: The channels of the levels of the network.
    """

    files: str
    make: Callable[[np.random.Generator], np.ndarray]
    write: Callable[[Path, np.ndarray], None]
    rows: Callable[[np.ndarray], list[tuple[str, list[Image.Image]]]]
    settings: dict[str, Any]
    steps: int
    batch: int = 32
    widths: tuple[int, ...] = (16, 32, 64)


# The data


def colors(rng: np.random.Generator) -> np.ndarray:
    """Return a disc or a square on a gradient, (3, 48, 64) uint8."""
    y, x = _pixels(*COLORS_SIZE)
    angle = rng.uniform(0, 2 * np.pi)
    share = 0.5 + (np.cos(angle) * (x - 32) + np.sin(angle) * (y - 24)) / 80
    ends = rng.uniform(0.55, 1, (2, 3))
    background = ends[0, :, None, None] * (1 - share) + ends[1, :, None, None] * share
    radius = rng.uniform(8, 15)
    away = np.abs([x - rng.uniform(16, 48), y - rng.uniform(16, 32)])
    distance = np.hypot(*away) if rng.random() < 0.5 else away.max(axis=0)
    paint = rng.permutation([0.1, 0.1, 0.8]) + rng.uniform(0, 0.15, 3)
    inside = np.clip(radius - distance + 0.5, 0, 1)
    return _rounded(255 * (background * (1 - inside) + paint[:, None, None] * inside), np.uint8)


def bands(rng: np.random.Generator) -> np.ndarray:
    """Return a landscape, (8, SIDE, SIDE) uint16 in [0, LARGEST_11_BITS]."""
    height, wetness, light = (_random_field(rng) for _ in range(3))
    is_land = 1 / (1 + np.exp(-8 * (height + 0.5)))
    is_green = is_land / (1 + np.exp(-6 * wetness))
    shares = np.stack([1 - is_land, is_land - is_green, is_green])
    values = np.einsum("sb,sij->bij", SPECTRA, shares) * (1 + 0.12 * light)
    return _rounded(np.clip(values, 0, 1) * LARGEST_11_BITS, np.uint16)


def fields(rng: np.random.Generator) -> np.ndarray:
    """Return three vortices of either sign, (1, SIDE, SIDE) float32."""
    y, x = _pixels(SIDE, SIDE)
    total = np.zeros((SIDE, SIDE))
    for _ in range(3):
        strength, width = rng.choice([-1, 1]) * rng.uniform(1, 2), rng.uniform(1.5, 2.8)
        center = rng.uniform(3, SIDE - 4, 2)
        total += strength * np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / (2 * width**2))
    return total[None].astype(np.float32)


def gray(rng: np.random.Generator) -> np.ndarray:
    """Return a cell with a nucleus, (1, SIDE, SIDE) uint16."""
    y, x = _pixels(SIDE, SIDE)
    center, axes, angle = rng.uniform(6, SIDE - 7, 2), rng.uniform(3.5, 6, 2), rng.uniform(0, np.pi)
    turned = [
        np.cos(angle) * (x - center[1]) + np.sin(angle) * (y - center[0]),
        np.cos(angle) * (y - center[0]) - np.sin(angle) * (x - center[1]),
    ]
    radius = np.hypot(turned[0] / axes[0], turned[1] / axes[1]) * axes.min()
    nucleus = np.hypot(y - center[0] - rng.uniform(-1, 1), x - center[1] - rng.uniform(-1, 1))
    plasma = np.clip(axes.min() - radius + 0.5, 0, 1) * rng.uniform(0.3, 0.45)
    core = np.clip(rng.uniform(1.2, 2.2) - nucleus + 0.5, 0, 1) * rng.uniform(0.35, 0.5)
    return _rounded((0.08 + plasma + core)[None] * LARGEST_16_BITS, np.uint16)


def wave_packets(rng: np.random.Generator) -> np.ndarray:
    """Return a wave packet A exp(-|r - c|^2 / 2 s^2 + i (k r + phase)), its two parts as (2, SIDE, SIDE) float32."""
    y, x = _pixels(SIDE, SIDE)
    center, width = rng.uniform(5, SIDE - 6, 2), rng.uniform(2.5, 3.5)
    wave, angle = rng.uniform(0.6, 1.1), rng.uniform(0, 2 * np.pi)
    phase = wave * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi)
    envelope = np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / (2 * width**2))
    packet = rng.uniform(0.7, 1.3) * envelope * np.exp(1j * phase)
    return np.stack([packet.real, packet.imag]).astype(np.float32)


def _pixels(height: int, width: int) -> np.ndarray:
    return np.mgrid[:height, :width]


def _random_field(rng: np.random.Generator) -> np.ndarray:
    """Return a Gaussian random field with power ~ |k|^-4, (SIDE, SIDE), of mean 0 and deviation 1."""
    frequencies = np.fft.fftfreq(SIDE) * SIDE
    radius = np.hypot(frequencies[:, None], frequencies[None])
    amplitude = np.where(radius > 0, np.maximum(radius, 1) ** -2.0, 0)
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIDE, SIDE))) * amplitude).real
    return field / field.std()


def _rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)


# Files and pictures


def write_png(folder: Path, images: np.ndarray) -> None:
    """Write a PNG file for each image."""
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")


def write_tiff(folder: Path, images: np.ndarray) -> None:
    """Write a TIFF file for each image, of a plane for each band."""
    for i, image in enumerate(images):
        tifffile.imwrite(folder / f"{i:04}.tif", image, photometric="minisblack", planarconfig="separate")


def write_numpy(folder: Path, images: np.ndarray) -> None:
    """Write one file of all images, without an axis for a single channel."""
    np.save(folder / "all.npy", images[:, 0] if images.shape[1] == 1 else images)


def read_samples(folder: Path) -> np.ndarray:
    """Return the samples that `hf-ddpm sample` wrote, (N, C, H, W)."""
    files = sorted(path for path in folder.iterdir() if path.stem.isdigit())
    arrays = [np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path)) for path in files]
    images = np.stack(arrays)
    if images.ndim == 3:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if files[0].suffix == ".png" else images


def color_rows(images: np.ndarray) -> list[tuple[str, list[Image.Image]]]:
    """Return images as they are."""
    return [("", to_pil(images))]


def band_rows(images: np.ndarray) -> list[tuple[str, list[Image.Image]]]:
    """Return three bands as red, green and blue, and three as infrared, red and green."""
    rows = []
    for title, channels in (("", (4, 2, 1)), (" in infrared", (6, 4, 2))):
        values = ValueRange(0, LARGEST_11_BITS, "uint16", channels)
        shares = values.to_unit_interval(torch.from_numpy(images.astype(np.int32)))
        rows.append((title, to_pil(pictured(shares, values))))
    return rows


def field_rows(images: np.ndarray) -> list[tuple[str, list[Image.Image]]]:
    """Return values from -3 (blue) through 0 (white) to 3 (red)."""
    return [("", _in_colors(images[:, 0] / 6 + 0.5, "RdBu_r"))]


def gray_rows(images: np.ndarray) -> list[tuple[str, list[Image.Image]]]:
    """Return 16 bits as gray."""
    return [("", to_pil(images / LARGEST_16_BITS))]


def complex_rows(images: np.ndarray) -> list[tuple[str, list[Image.Image]]]:
    """Return magnitudes, in gray up to 1.3, and phases as colors, as bright as the magnitude."""
    values = images[:, 0] + 1j * images[:, 1]
    magnitudes = np.clip(np.abs(values) / 1.3, 0, 1)
    phases = _in_colors(np.angle(values) / (2 * np.pi) + 0.5, "hsv", magnitudes)
    return [(": magnitude", _in_colors(magnitudes, "gray")), (": phase", phases)]


def _in_colors(shares: np.ndarray, name: str, brightness: np.ndarray | float = 1.0) -> list[Image.Image]:
    """Return (N, H, W) in [0, 1] as images, by a color map of matplotlib."""
    colors = colormaps[name](np.clip(shares, 0, 1))[..., :3] * np.asarray(brightness)[..., None]
    return to_pil(colors.transpose(0, 3, 1, 2))


KINDS = {
    "colors": Kind("PNG, RGB", colors, write_png, color_rows, {}, steps=350, batch=16),
    "bands": Kind(
        "TIFF, 8 bands",
        bands,
        write_tiff,
        band_rows,
        {"value_range": (0, LARGEST_11_BITS), "display_channels": (4, 2, 1)},
        steps=1200,
        widths=(32, 64),  # 16 channels let too little of eight bands pass
    ),
    "fields": Kind(
        "NumPy", fields, write_numpy, field_rows, {"stack_axis": 0, "value_quantiles": (0.0005, 0.9995)}, steps=600
    ),
    "gray": Kind("PNG, 16 bits", gray, write_png, gray_rows, {}, steps=300),
    "complex": Kind("NumPy, 2 channels", wave_packets, write_numpy, complex_rows, {}, steps=600),
}


def main() -> None:
    """Train, sample and measure each kind, and write the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"Of {', '.join(KINDS)}; default: all.")
    parser.add_argument(
        "--runs", type=Path, help="A folder that keeps the models; those that it holds are not trained."
    )
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options = parser.parse_args()
    if unknown := [name for name in options.kinds if name not in KINDS]:
        parser.error(f"KIND must be of {', '.join(KINDS)}, got {', '.join(unknown)}")
    for name in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            of_kind = (options.runs or Path(folder)) / name
            row = {"kind": name, "machine": options.machine, **measure(name, of_kind)}
        path = FOLDER / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        rows = [line for line in rows if line["kind"] != name] + [row]
        rows.sort(key=lambda line: [*KINDS].index(line["kind"]))
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in rows))
        write_table(rows)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train, sample and measure a kind, draw its picture, and return its row.

    Args:
        name: The kind.
        folder: A new folder for its files and its model, or one that holds them.
    """
    kind, rng = KINDS[name], np.random.default_rng(0)
    data = np.stack([kind.make(rng) for _ in range(NUM_IMAGES)])
    if not (folder / "run/run.json").is_file():
        train(kind, data, folder)
    settings: dict[str, Any] = {"metrics": ("values",), "num_images": NUM_SAMPLES}
    (result,) = evaluate(folder / "run", **settings)["results"]
    with tempfile.TemporaryDirectory() as out:
        write_samples(str(folder / "run"), out, num_images=NUM_SAMPLES)
        samples = read_samples(Path(out))
    draw(name, data, samples)
    facts = read_run(folder / "run")
    largest = np.iinfo(data.dtype).max if data.dtype.kind == "u" else 1
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in ("torch", "diffusers")},
        "dtype": str(data.dtype),
        "shape": data.shape[1:],
        "dtype_of_samples": str(samples.dtype),
        "values": facts["data"].get("values"),
        "data": statistics_of(data),
        "samples": statistics_of(samples),
        "distance": result["value"],
        "distance_of_halves": result["real_vs_real"]["value"],
        "steps": facts["training"]["steps"],
        "batch": kind.batch,
        "seconds": json.loads((folder / "seconds.json").read_text()),
        "difference_from_stock": difference_from_stock(folder, largest),
    }


def train(kind: Kind, data: np.ndarray, folder: Path) -> None:
    """Write the files, train a model by `hf-ddpm train`, and note the seconds of the processor that it took."""
    (folder / "data").mkdir(parents=True)
    kind.write(folder / "data", data)
    (folder / "unet.json").write_text(json.dumps(network_config(kind, data)))
    settings = {
        "train_data_dir": folder / "data",
        "model_config_name_or_path": folder / "unet.json",
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "train_batch_size": kind.batch,
        "max_train_steps": kind.steps,
        **SETTINGS,
        **kind.settings,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", *_shown(value).split())]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "hf_ddpm", "train", *options, "--no_save_figures"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder / "seconds.json").write_text(json.dumps(seconds))


def network_config(kind: Kind, data: np.ndarray) -> dict[str, Any]:
    """Return the config of a network that two to three minutes on one core suffice for."""
    num_plain = len(kind.widths) - 1
    return {
        "sample_size": data.shape[2:],
        "in_channels": data.shape[1],
        "out_channels": data.shape[1],
        "layers_per_block": 1,
        "block_out_channels": kind.widths,
        "down_block_types": ["DownBlock2D"] * num_plain + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * num_plain,
        "attention_head_dim": 32,
        "norm_num_groups": kind.widths[0] // 4,
        "resnet_time_scale_shift": "scale_shift",
    }


def statistics_of(images: np.ndarray) -> dict[str, float | None]:
    """Return the smallest and largest value, mean, deviation, and mean correlation of two channels of images."""
    channels = np.moveaxis(images, 1, 0).reshape(images.shape[1], -1).astype(np.float64)
    correlation = None
    if len(channels) > 1:
        correlation = float(np.atleast_2d(np.corrcoef(channels))[np.triu_indices(len(channels), 1)].mean())
    return {
        "min": float(channels.min()),
        "max": float(channels.max()),
        "mean": float(channels.mean()),
        "std": float(channels.std()),
        "correlation": correlation,
    }


def difference_from_stock(folder: Path, largest: int) -> float:
    """Return the largest difference between samples of stock diffusers and of ours, in the units of the data.

    Args:
        folder: The folder with the run.
        largest: The value that 1 stands for in images of image files.
    """
    out = folder / "stock.npy"
    command = [sys.executable, "-c", STOCK, str(folder / "run"), str(NUM_STOCK_SAMPLES), str(out)]
    subprocess.run(command, check=True)
    shares = np.load(out)
    torch.set_num_threads(1)
    pipeline = DDPMPipeline.from_pretrained(folder / "run")
    values = pipeline.value_range
    low, high = (0, largest) if values is None else (values.low, values.high)
    generator = torch.Generator().manual_seed(0)
    ours = pipeline(NUM_STOCK_SAMPLES, generator, num_inference_steps=20, output_type="np").images
    ours = ours.astype(np.float64) * (largest if values is None else 1)
    of_stock = low + shares.astype(np.float64) * (high - low)
    return float(np.abs(ours - of_stock).max())


def draw(name: str, data: np.ndarray, samples: np.ndarray) -> None:
    """Draw the picture of a kind: COLUMNS images of the data, and below them as many samples."""
    titles: list[str] = []
    images: list[Image.Image] = []
    for title, values in (("data", data), ("samples", samples)):
        for i in range(2):
            for what, row in KINDS[name].rows(values[i * COLUMNS : (i + 1) * COLUMNS]):
                titles.append(title + what)
                images += row
    sheet = with_row_titles(grid(images, COLUMNS), titles)
    write_atomically(FOLDER / f"{name}.png", png_bytes(sheet))


def write_table(rows: Sequence[dict[str, Any]]) -> None:
    """Write two tables: what the models are of, and how their samples compare with the data."""
    lines = [
        "Small models of kinds of data, by `python -m benchmarks.data_kinds.run`. Seconds are those of the",
        f"processor for all of `hf-ddpm train`; each kind has {NUM_IMAGES:,} images. Values, means and deviations are",
        f"in the units of the data; the samples are {NUM_SAMPLES}, by 20 steps of UniPC. Correlation is the mean over",
        "pairs of channels. The distance is that of `hf-ddpm evaluate --metrics values`; lower is better, and halves",
        "of the data have the one beside it. Stock is the largest difference between samples of diffusers'",
        "DDPMPipeline, in a process that cannot import hf_ddpm, and of `hf_ddpm.DDPMPipeline`. Of arrays of integers",
        "the latter are rounded, so that half a unit is none.",
        "",
        "| kind | files | type | shape | settings | channels of levels | steps, batch | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind = KINDS[row["kind"]]
        settings = " ".join(f"--{name} {_shown(value)}" for name, value in kind.settings.items())
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['kind']} | {kind.files} | {row['dtype']} | {'x'.join(map(str, row['shape']))} "
            f"| {f'`{settings}`' if settings else ''} | {', '.join(map(str, kind.widths))} "
            f"| {row['steps']}, {row['batch']} | {seconds} |"
        )
    lines += [
        "",
        f"| {' | '.join(COLUMNS_OF_VALUES)} |",
        "|---" * len(COLUMNS_OF_VALUES) + "|",
    ]
    for row in rows:
        data, samples = row["data"], row["samples"]
        cells = [row["kind"], *(f"{_number(each['min'])} to {_number(each['max'])}" for each in (data, samples))]
        cells += [row["dtype_of_samples"]]
        cells += [f"{_number(each['mean'])}, {_number(each['std'])}" for each in (data, samples)]
        cells += ["" if each["correlation"] is None else _number(each["correlation"]) for each in (data, samples)]
        cells += [f"{row['distance']:.3g}", f"{row['distance_of_halves']:.3g}", f"{row['difference_from_stock']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| kind | machine | date | torch, diffusers |", "|---|---|---|---|"]
    for row in rows:
        versions = ", ".join(row["versions"].values())
        lines.append(f"| {row['kind']} | {row['machine']} | {row['date']} | {versions} |")
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == 0 else f"{round(value, 2) + 0:.2f}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    main()
