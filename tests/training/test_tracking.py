"""The run of a tracker goes on when the run resumes: one curve, without a gap, with no step twice."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hf_ddpm.runtime.errors import RunError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.forks import Process

LOGGERS = [
    "tensorboard",
    pytest.param("trackio", marks=pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is in dev")),
    pytest.param("wandb", marks=pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is in no extra")),
]
BLOCK = 1 << 15
Curve = list[tuple[int, str, Any]]  # step, name and value of each that a tracker holds


def train_there(config: TrainingConfig, folder: Path, last_step: int | None) -> None:
    """Train with the trackers' files in a folder; an error ends the run after the last step, with a checkpoint."""
    os.environ |= {
        "TRACKIO_DIR": str(folder),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }

    def end(event: Any, run: Any) -> None:
        if event.name == "log" and event.step == last_step:
            raise ValueError("the end")

    try:
        train(config, callbacks=[end])
    except RunError:
        assert last_step is not None


def start(config: TrainingConfig, folder: Path, last_step: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    process = Process(train_there, (config, folder, last_step))
    process.start()
    process.join()
    assert process.exitcode == 0


def in_tensorboard(config: TrainingConfig, _: Path) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(config.output_dir) / "logs/hf_ddpm"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2  # the settings, of one start
    curve: Curve = [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    return curve + [(e.step, name, None) for name in events.Tags()["images"] for e in events.Images(name)]


def id_of(config: TrainingConfig) -> str:
    return json.loads((Path(config.output_dir) / "tracker.json").read_text())["id"]


def in_trackio(config: TrainingConfig, folder: Path) -> Curve:
    connection = sqlite3.connect(folder / "hf_ddpm.db")
    query = "select run_id, step, metrics from metrics where run_name = ?"
    rows = connection.execute(query, [f"{Path(config.output_dir).name}-{id_of(config)}"]).fetchall()
    connection.close()
    assert len({run_id for run_id, _, _ in rows}) == 1
    return [(step, name, value) for _, step, metrics in rows for name, value in json.loads(metrics).items()]


def in_wandb(config: TrainingConfig, folder: Path) -> Curve:
    """Return what the newest of the folders holds that W&B makes for each start offline, of one run id."""
    *_, newest = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.stem == f"run-{id_of(config)}"
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    curve: Curve = []
    for content in records_of_wandb(newest.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        curve += [(items["_step"], name, value) for name, value in items.items() if not name.startswith("_")]
    return curve


def records_of_wandb(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log of LevelDB, in blocks of 32 KiB, after the 7 bytes that W&B begins it with.

    A part of a record has a checksum, its length, and whether it is whole (1), the first, one between or the last (4).
    """
    place, record = 7, b""
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


CURVES = {"tensorboard": in_tensorboard, "trackio": in_trackio, "wandb": in_wandb}


@pytest.mark.slow
@pytest.mark.parametrize("logger", LOGGERS)
def test_resumed_run_is_one_curve(tiny_settings: dict[str, Any], tmp_path: Path, logger: str):
    """Where it was trained, and in a folder of another name on a machine that has nothing of the tracker."""
    config = TrainingConfig(**tiny_settings, logger=logger, resume_from_checkpoint="latest")
    start(config, tmp_path / "trackers", last_step=5)
    folder, moved = Path(config.output_dir), tmp_path / "moved"
    shutil.rmtree(folder / "checkpoint-5")  # as if it had been killed: steps 4 and 5 are taken again
    shutil.copytree(folder, moved, ignore=shutil.ignore_patterns("logs"))
    for output_dir, trackers in ((folder, tmp_path / "trackers"), (moved, tmp_path / "new-trackers")):
        resumed = replace(config, output_dir=str(output_dir))
        start(resumed, trackers)
        curve = CURVES[logger](resumed, trackers)
        assert max(Counter((step, name) for step, name, _ in curve).values()) == 1
        losses = {step: value for step, name, value in curve if name == "loss"}
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        assert losses == pytest.approx({line["step"]: line["loss"] for line in lines})
        assert losses.keys() == {*range(1, 7)}
        pictures = {step for step, name, _ in curve if name == "samples"}
        assert pictures == {int(path.stem.removeprefix("step-")) for path in (output_dir / "previews").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("logger", LOGGERS)
def test_start_that_left_no_checkpoint_is_no_other_run(tiny_settings: dict[str, Any], tmp_path: Path, logger: str):
    """It goes on from step 0, and takes no folder of the same name for its own."""
    config = TrainingConfig(**tiny_settings, logger=logger, resume_from_checkpoint="latest")
    trackers, namesake = tmp_path / "trackers", tmp_path / "other" / Path(config.output_dir).name
    start(replace(config, output_dir=str(namesake), seed=1), trackers)
    start(config, trackers, last_step=2)
    for path in Path(config.output_dir).glob("checkpoint-*"):
        shutil.rmtree(path)  # as if it had been killed before the first one
    start(config, trackers)
    curve = CURVES[logger](config, trackers)
    assert max(Counter((step, name) for step, name, _ in curve).values()) == 1
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = {step: value for step, name, value in curve if name == "loss"}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert losses.keys() == {*range(1, 7)}
