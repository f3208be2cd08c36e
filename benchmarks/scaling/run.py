"""Measure how the cost of a run grows with its images, from 10^4 to 10^7, and with its processes, from 1 to 1,024.

    python -m benchmarks.scaling.run --machine NAME

No row is extrapolated. One machine shows the order of images for the last of 1,024 processes, which is arithmetic, and
checkpoints of as many; steps, exchanges and sharded weights it shows for 1, 2 and 4 processes, joined by gloo. A step
is that of a network that sleeps, so that other work on the machine does not make it longer, and what the package does
beside it is counted in seconds of the processor. Memory is that of a process without files that are mapped, beyond
what it held before. Writes `table.md`. It takes about ten minutes, and a gigabyte on the disk of temporary files.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.scaling import images, steps
from benchmarks.scaling.apart import MIB, in_processes
from tests.support.networks import tiny_unet_config

IMAGES, PROCESSES, WORKERS = (10**4, 10**5, 10**6, 10**7), (1, 8, 64, 1024), 8
# The kind of a data set -> its numbers of images, and the largest that is also decoded.
DATA = {"files": ((10**3, 10**4, 10**5), 10**4), "parquet": ((10**4, 10**5, 10**6), 10**5)}
NETWORK = tiny_unet_config(
    1, block_out_channels=[128, 256], layers_per_block=2, norm_num_groups=8, num_class_embeds=11
)
SHARDED = ((1, False), (2, False), (2, True), (4, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="what the machine is called in the table")
    machine = parser.parse_args().machine
    head = (
        f"By `python -m benchmarks.scaling.run` ({machine}, torch {version('torch')}, numpy {version('numpy')}). "
        "Seconds are of the processor, MiB of memory that no mapped file holds; fewer are better."
    )
    lines = ["# The growth of cost", "", head]
    with tempfile.TemporaryDirectory() as temporary:
        folders = (Path(temporary, f"{number}") for number in range(1000))
        for part in (order_of_images, draws, starts, parts_of_a_step, exchanges, checkpoints, sharded_memory):
            lines += ["", *part(folders)]
            print("\n".join(lines), flush=True)
    (Path(__file__).parent / "table.md").write_text("\n".join(lines) + "\n")


def new_folder(folders: Iterator[Path]) -> str:
    """Make the next folder, and return its path."""
    folder = next(folders)
    folder.mkdir()
    return str(folder)


def section(title: str, text: str, rows: list[str]) -> list[str]:
    """Return the lines of a section of the table."""
    return [title, "", *([text, ""] if text else []), *rows]


def table(columns: str, rows: Iterator[str] | list[str]) -> list[str]:
    """Return the lines of a table with these columns, divided by bars."""
    return [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|", *(f"| {row} |" for row in rows)]


def order_of_images(folders: Iterator[Path]) -> list[str]:
    """Measure the micro-batches of one of many processes, from the caches of many images."""
    rows = []
    for num_images in IMAGES:
        folder = next(folders)
        images.write_cache(folder, num_images)
        for num_processes in PROCESSES:
            [of] = in_processes(1, images.measure_order, str(folder), num_images, num_processes)
            times = " | ".join(f"{1e3 * of[name]:.2f}" for name in ("seconds", "first_seconds", "resumed_seconds"))
            rows.append(f"{num_images:,} | {num_processes:,} | {times} | {of['bytes'] / MIB:.1f}")
    return section(
        f"## Reading {images.BATCH} images of a cache, with their order, crops and flips",
        "In the last of the processes: the median of batches of the first epoch; its first batch, which draws the "
        "order of the images; and the first batch of a run that is resumed in its tenth epoch. The memory is that of "
        "the orders of two epochs.",
        table("images | processes | a batch, ms | first batch, ms | first batch when resumed, ms | MiB", rows),
    )


def draws(_: Iterator[Path]) -> list[str]:
    """Measure t and eps at places of the stream."""
    positions = (0, 10**7, 10**12)
    rows = [f"{p:,} | {1e3 * in_processes(1, images.measure_draws, p)[0]:.2f}" for p in positions]
    return section(f"## t and eps of {images.BATCH} images, 3x32x32", "", table("images seen before | ms", rows))


def starts(folders: Iterator[Path]) -> list[str]:
    """Measure what happens to images before the first step."""
    rows = []
    for kind, (sizes, largest_decoded) in DATA.items():
        for num_images in sizes:
            folder = next(folders)
            images.WRITERS[kind](folder, num_images)
            for work in images.works_of(kind, is_decoded=num_images <= largest_decoded):
                [of] = in_processes(1, images.measure_start, str(folder), kind, work)
                per_image = f"{1e6 * of['seconds'] / num_images:.1f}"
                rows.append(f"{kind} | {work} | {num_images:,} | {of['seconds']:.2f} | {per_image} | {of['MiB']:.1f}")
    return section(
        "## Images before the first step",
        "PNG files in folders of a hundred, and one parquet file. Each row is a process of its own.",
        table("data | work | images | seconds | microseconds for an image | MiB", rows),
    )


def parts_of_a_step(folders: Iterator[Path]) -> list[str]:
    """Measure the parts of a step in 1, 2 and 4 processes."""
    columns: list[dict[str, float]] = []
    for num_processes in (1, 2, 4):
        everyones = in_processes(num_processes, steps.measure_step, new_folder(folders))
        columns.append({part: max(of.get(part, 0.0) for of in everyones) for part in everyones[0]})
    own = [part for part in columns[0] if part not in (steps.NETWORK, steps.CHECKPOINT, steps.MODELS)]
    rows = [f"{part} | " + " | ".join(f"{1e3 * of[part]:.2f}" for of in columns) for part in sorted(own)]
    sums = [sum(of[part] for part in own) for of in columns]
    rows.append("all of it | " + " | ".join(f"{1e3 * seconds:.2f}" for seconds in sums))
    shares = (seconds / (seconds + steps.STEP_SECONDS) for seconds in sums)
    rows.append(f"share of a step of {steps.STEP_SECONDS} s | " + " | ".join(f"{share:.1%}" for share in shares))
    for name, part in (("a checkpoint", steps.CHECKPOINT), (f"{steps.MODELS}, all", steps.MODELS)):
        rows.append(f"{name} | " + " | ".join(f"{1e3 * of[part]:.2f}" for of in columns))
    return section(
        "## The package's own part of a step",
        f"Milliseconds of the slowest of 1, 2 and 4 processes with DDP, 8 digits in each, a line of metrics each "
        f"{steps.STEPS_BETWEEN_LINES} steps; means of {steps.STEPS - 1} steps. The network has 7,713 parameters and "
        "sleeps; its passes are not counted.",
        table("part | 1 | 2 | 4", rows),
    )


def exchanges(folders: Iterator[Path]) -> list[str]:
    """Count the exchanges of 2 and 4 processes."""
    places = {"any": "votes, each step", "take_step": "the step", "log": "a line", "write_state": "a checkpoint"}
    rows, weights = [], 0
    for is_sharded, optimizer in ((False, "adamw"), (True, "adamw"), (True, "muon")):
        kind = "FSDP 2" if is_sharded else "DDP"
        variables = steps.FSDP if is_sharded else {}
        counted = [
            in_processes(count, steps.measure_collectives, new_folder(folders), is_sharded, optimizer, **variables)[0]
            for count in (2, 4)
        ]
        weights = counted[0]["weights"]
        for name, place in places.items():
            operations = sorted({operation for of in counted for operation in of.get(name, {})})
            for operation in operations:
                cells = [of[name].get(operation, (0, 0)) for of in counted]
                numbers = " | ".join(f"{number:,} | {size:,}" for number, size in cells)
                rows.append(f"{kind}, {optimizer} | {place} | {operation} | {numbers}")
    return section(
        "## Exchanges among processes",
        "What the main process takes part in, with the bytes of all tensors that it gives and gets, in the second "
        f"step. The weights are {weights:,} bytes, and DDP exchanges as many of gradients. Its two broadcasts are of "
        "that step alone, after which it keeps the order of its gradients.",
        table("training | when | operation | of 2: count | bytes | of 4: count | bytes", rows),
    )


def checkpoints(folders: Iterator[Path]) -> list[str]:
    """Measure the checkpoints of streams that many processes read."""
    rows = []
    for num_processes in PROCESSES:
        [of] = in_processes(1, steps.measure_checkpoint, new_folder(folders), num_processes, WORKERS)
        sizes = f"{of['files']} | {of['bytes'] / 1e3:,.0f} | {of['progress'] / 1e3:,.0f}"
        rows.append(f"{num_processes:,} | {sizes} | {of['seconds']:.3f} | {1e6 * of['advance_seconds']:.1f}")
    return section(
        "## Checkpoints of a stream",
        f"The main process writes all of it: a small network, and in progress.json the place of each of {WORKERS} "
        "workers of each process. A step notes the place of the worker that it read from.",
        table("processes | files | kB | of it progress.json | seconds | noting a place, microseconds", rows),
    )


def sharded_memory(folders: Iterator[Path]) -> list[str]:
    """Measure the memory of processes that share a network, or do not."""
    rows = []
    for num_processes, is_sharded in SHARDED:
        folder, variables = new_folder(folders), steps.FSDP if is_sharded else {}
        arguments = (folder, is_sharded, NETWORK)
        new = in_processes(num_processes, steps.measure_memory, *arguments, 1, **variables)
        resumed = in_processes(num_processes, steps.measure_memory, *arguments, 2, **variables)
        for name, ranks in (("main", slice(1)), ("others", slice(1, None))):
            if not new[ranks]:
                continue
            held = [_most(of["held"][kind] for of in new[ranks]) for kind in ("weights", "moments", "averages")]
            peaks = [_most(of[kind] for of in new[ranks]) for kind in ("save_checkpoint", "save_model")]
            peaks.append(_most(of["load_checkpoint"] for of in resumed[ranks]))
            kind = "FSDP 2" if is_sharded else "DDP" if num_processes > 1 else "one process"
            rows.append(f"{kind} | {num_processes} | {name} | " + " | ".join([*held, *peaks]))
    head = "training | processes | process | weights | moments | averages | checkpoint | model | resume"
    return section(
        "## Sharded weights",
        "MiB that a process holds of a network of 15.9 million parameters with AdamW and three averages, and the most "
        "that writing a checkpoint, writing the model and resuming add to what it holds.",
        table(head, rows),
    )


def _most(values: Any) -> str:
    return f"{max(values) / MIB:.0f}"


if __name__ == "__main__":
    main()
