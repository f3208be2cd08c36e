"""Measure the memory of processes that stream 10,000 and 1,000,000 images: it must not grow with their number.

    python -m benchmarks.streaming_memory.run

Writes gray PNG images of 8x8 pixels into parquet files in a temporary folder, streams each of them once through
`StreamBatches` in a `DataLoader` with 2 workers, as training does, and writes `table.md` and `memory.png`. Needs
Linux. The memory of the process and its workers together is

PSS        the pages in use, without files (libraries): a page that n processes share counts as one n-th in each
USS        the pages that one process has alone: shared pages, mostly imported modules, do not count
"""

from __future__ import annotations

import argparse
import gc
import io
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from datasets import disable_progress_bars
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from hf_ddpm.data.shard_batches import StreamBatches
from hf_ddpm.data.shards import open_stream
from hf_ddpm.plots import Curve, draw_curves
from hf_ddpm.training.config import TrainingConfig

HERE = Path(__file__).parent
SIZES = (10_000, 1_000_000)
NUM_FILES, ROW_GROUP, NUM_WORKERS, BATCH_SIZE, BUFFER, NUM_READINGS = 10, 1000, 2, 50, 1000, 100
SCHEMA = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})


def write_images(folder: Path, num_images: int) -> None:
    """Write images of which no two are alike: the first four pixels of image n spell n."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file in range(NUM_FILES):
        ids = range(file * num_images // NUM_FILES, (file + 1) * num_images // NUM_FILES)
        with parquet.ParquetWriter(folder / f"train-{file:02}.parquet", SCHEMA) as writer:
            for start in range(0, len(ids), ROW_GROUP):
                group = ids[start : start + ROW_GROUP]
                pixels = rng.integers(0, 256, (len(group), 8, 8), dtype=np.uint8)
                pixels[:, 0, :4] = np.array(group, ">u4").view(np.uint8).reshape(-1, 4)
                cells = []
                for values in pixels:
                    buffer = io.BytesIO()
                    Image.fromarray(values).save(buffer, "PNG", compress_level=1)
                    cells.append({"bytes": buffer.getvalue(), "path": None})
                writer.write_table(pa.table({"image": cells}, schema=SCHEMA), row_group_size=ROW_GROUP)


def used_mib() -> tuple[float, float]:
    """Return the memory in use: PSS without files, and USS, in MiB."""
    process, pss, uss = psutil.Process(), 0.0, 0.0
    for member in (process, *process.children()):
        lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        pss += (kib["Pss_Anon"] + kib["Pss_Shmem"]) / 2**10
        uss += (kib["Private_Clean"] + kib["Private_Dirty"]) / 2**10
    return pss, uss


def stream_once(folder: Path, num_images: int) -> tuple[list[float], np.ndarray]:
    """Return the percent of the images at each reading, and the MiB in use by PSS and USS, (2, readings)."""
    config = TrainingConfig(
        dataset_name=str(folder),
        cache_dir=str(folder.parent / "cache"),
        streaming=True,
        shuffle_buffer_images=BUFFER,
    )
    num_steps = num_images // BATCH_SIZE
    batches = StreamBatches(
        open_stream(config),
        seed=0,
        random_flip=False,
        batch_size=BATCH_SIZE,
        accumulation_steps=1,
        rank=0,
        num_processes=1,
        first_position=0,
        num_steps=num_steps,
        num_substreams=NUM_WORKERS,
        chunk_size=BATCH_SIZE,
        shuffle_buffer_images=BUFFER,
    )
    percents, used, seen = [], [], np.zeros(num_images, bool)
    loader = DataLoader(batches, batch_size=None, num_workers=NUM_WORKERS)
    gc.freeze()  # as in training: garbage collection in the workers would copy what they share
    iterator = iter(loader)
    gc.unfreeze()
    for step, batch in enumerate(iterator, 1):
        bytes_of_ids = np.ascontiguousarray(batch["pixels"].numpy()[:, 0, 0, :4])
        seen[bytes_of_ids.view(">u4")[:, 0]] = True
        if step % (num_steps // NUM_READINGS) == 0 and step < num_steps:
            percents.append(100 * step / num_steps)
            used.append(used_mib())
    assert seen.all(), f"{num_images - seen.sum()} of {num_images} images were not seen in one pass"
    return percents, np.array(used).T


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    disable_progress_bars()
    lines, curves = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for num_images in SIZES:
            folder = Path(temporary, str(num_images))
            write_images(folder, num_images)
            percents, used = stream_once(folder, num_images)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
            curves.append(Curve(f"{num_images:,} images", percents, used[0]))
            tenth = used.shape[1] // 10
            for measure, mib in zip(("PSS", "USS"), used, strict=True):
                medians = [float(np.median(part)) for part in (mib[:tenth], mib, mib[-tenth:])]
                memory = " | ".join(f"{value:.0f}" for value in (*medians, mib.max()))
                lines.append(f"| {num_images:,} | {size:.0f} | {measure} | {memory} |")
    draw_curves(
        HERE / "memory.png",
        curves,
        title="Memory while streaming",
        x_label="images streamed, percent",
        y_label="memory in use (PSS), MiB",
        y_from_zero=True,
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "datasets", "pyarrow"))
    head = (
        f"{libraries}, Python {platform.python_version()}, {platform.machine()}. Gray PNG images of 8x8 pixels in "
        f"{NUM_FILES} parquet files with row groups of {ROW_GROUP}, each streamed once with {NUM_WORKERS} workers, "
        f"batches of {BATCH_SIZE} and `shuffle_buffer_images` {BUFFER}. MiB of the process and its workers together: "
        "PSS without files, in which a page that they share counts once, and USS, without pages that they share. "
        f"{NUM_READINGS - 1} readings evenly over the pass; medians, lower is better.\n\n"
        "| images | parquet, MiB | measure | first tenth | whole pass | last tenth | largest |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    (HERE / "table.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
