"""Streaming of images and shards that are damaged or vanish."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_ddpm.data.shard_batches import BlockStart
from hf_ddpm.data.shards import open_stream
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.training.checkpoint import verify
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.image_data import png
from tests.support.runs import differences
from tests.support.streams import (
    numbered_image,
    numbers_of,
    read_stream,
    save_folder,
    save_parquet,
    stream_batches,
    stream_config,
)

# A machine may have fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


# Images


@pytest.mark.slow
def test_unreadable_image_is_replaced_by_its_neighbor(folder: Path) -> None:
    bad = (0, 5, 6, 20, 29, 30)
    save_parquet(folder, [30, 20], bad=bad)
    stream = open_stream(stream_config(folder, on_bad_image="skip", label_column="kind"))
    good, _ = read_stream(stream, 0, 96, batch_size=4, num_processes=1)
    assert read_stream(stream, 0, 96, batch_size=6, num_processes=2, workers=2)[0] == good
    assert not set(good.values()) & set(bad)
    batches = list(stream_batches(stream, num_substreams=1, batch_size=50, chunk_size=50, num_steps=2))
    assert [int(batch["num_bad"]) for batch in batches] == [6, 6]
    assert all(batch["labels"].tolist() == [n % 2 for n in numbers_of(batch["pixels"])] for batch in batches)
    assert np.array_equal(stream.image(0)[0], numbered_image(1))


def test_stream_names_unreadable_image(folder: Path) -> None:
    save_parquet(folder, [70, 20], bad=(81,))
    stream = open_stream(stream_config(folder))
    with pytest.raises(UsageError, match=r"row 11 \(81\.png in .*train-00001\.parquet\).*--on_bad_image skip"):
        list(stream_batches(stream, num_steps=30))


@pytest.mark.slow
def test_skip_passes_over_many_unreadable_images_but_not_all(folder: Path) -> None:
    save_parquet(folder, [64, 9, 120], bad=tuple(range(64, 73)))
    stream = open_stream(stream_config(folder, on_bad_image="skip"))
    content, _ = read_stream(stream, 0, 386, batch_size=1, num_processes=1, num_substreams=1)
    assert not set(content.values()) & set(range(64, 73))
    assert read_stream(stream, 200, 180, batch_size=1, num_processes=1, num_substreams=1)[0].items() <= content.items()
    few, _ = read_stream(stream, 0, 193, batch_size=1, num_processes=1, num_substreams=1, shuffle_buffer_images=3)
    assert sorted(set(few.values())) == [*range(64), *range(73, 193)]
    save_parquet(folder, [64, 9, 120], bad=tuple(range(64, 193)))
    stream = open_stream(stream_config(folder, on_bad_image="skip"))
    with pytest.raises(UsageError, match=r"got \d+ unreadable ones in a row, up to row \d+ .*train-0000"):
        list(stream_batches(stream, num_steps=48, num_substreams=1))


def test_stream_skips_or_names_vanished_image(folder: Path) -> None:
    save_folder(folder, 20)
    stream = open_stream(stream_config(folder))
    (folder / "odd" / "0007.png").unlink()
    message = r"odd/0007\.png.*put it back as it was, or repair it; with --on_bad_image skip"
    with pytest.raises(RunError, match=message):
        list(stream_batches(stream, num_substreams=1))
    (folder / "odd" / "0007.png").write_bytes(png(numbered_image(7)))
    stream = open_stream(stream_config(folder, on_bad_image="skip"))
    (folder / "odd" / "0007.png").unlink()
    batch = next(iter(stream_batches(stream, num_substreams=1, batch_size=20)))
    assert int(batch["num_bad"]) == 1


def test_skip_does_not_hide_lack_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(folder, 20)
    stream = open_stream(stream_config(folder, on_bad_image="skip"))

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("hf_ddpm.data.decoding.to_planes", fails)
    with pytest.raises(UsageError, match=r"every image must be readable, got .*: MemoryError; try again"):
        stream.decode(next(stream.examples()))


def test_skip_does_not_hide_errors_of_a_disk(folder: Path) -> None:
    save_folder(folder, 20)
    stream = open_stream(stream_config(folder, on_bad_image="skip"))
    (folder / "odd" / "0007.png").unlink()
    (folder / "odd" / "0007.png").mkdir()
    with pytest.raises(RunError, match=r"odd/0007\.png.*IsADirectoryError"):
        list(stream_batches(stream, num_substreams=1))


def test_stream_names_image_without_class(folder: Path) -> None:
    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=["a"]))
    encoded = [{"bytes": png(numbered_image(n)), "path": None} for n in range(3)]
    shard = datasets.Dataset.from_dict({"image": encoded, "kind": [0, 0, None]}, features=features)
    shard.to_parquet(folder / "a.parquet")
    stream = open_stream(stream_config(folder, label_column="kind"))
    with pytest.raises(UsageError, match=r"each image a class, got None in row 2 \(.*a\.parquet\) of 'kind'"):
        list(stream_batches(stream))


# Shards


def test_stream_names_truncated_parquet_file(folder: Path) -> None:
    save_parquet(folder, [30, 20])
    stream = open_stream(stream_config(folder))
    content = Path(stream.files[1]).read_bytes()
    Path(stream.files[1]).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"train-00001\.parquet cannot be read: .*put it back"):
        list(stream_batches(stream, num_substreams=1, num_steps=13))
    with pytest.raises(UsageError, match=r"must hold whole parquet files, got '.*train-00001\.parquet"):
        open_stream(stream_config(folder))


def test_shortened_shard_is_an_error(folder: Path) -> None:
    save_parquet(folder, [30, 20])
    stream = open_stream(stream_config(folder))
    start = BlockStart(substream=0, element=0, epoch=0, shard_index=0, row=25)
    save_parquet(folder, [12, 20])
    with pytest.raises(RunError, match=r"train-00000\.parquet.*has 12 rows and had 30"):
        list(stream_batches(stream, num_substreams=1, num_steps=13))
    # Where the number of rows is not known, what was read before tells it, or a block start.
    stream.rows_per_shard[:] = -1
    batches = stream_batches(stream, num_substreams=1, num_steps=100)
    iterator = iter(batches)
    for _ in range(12):  # more than an epoch, less than two
        next(iterator)
    save_parquet(folder, [12, 15])
    with pytest.raises(RunError, match=r"train-00001\.parquet.*has 15 rows and had 20"):
        list(iterator)
    stream.rows_per_shard[:] = -1
    with pytest.raises(RunError, match="rows and had 26"):
        list(stream_batches(stream, num_substreams=1, block_starts=(start,)))


def test_emptied_data_are_an_error(folder: Path) -> None:
    save_parquet(folder, [20, 20])
    stream = open_stream(stream_config(folder))
    save_parquet(folder, [0, 0])
    stream.rows_per_shard[:] = -1
    with pytest.raises(RunError, match="has no images any more"):
        next(iter(stream_batches(stream)))


# Runs


@pytest.fixture
def run_config(tiny_settings: dict[str, Any], folder: Path) -> TrainingConfig:
    """Settings of a run of some seconds that streams `folder`."""
    changes = {"train_data_dir": None, "dataset_name": str(folder), "cache_dir": str(folder.parent / "cache")}
    changes |= {"streaming": True, "shuffle_buffer_images": 4, "resolution": 8, "max_train_steps": 6}
    return TrainingConfig(**{**tiny_settings, **changes, "random_flip": True, "checkpointing_steps": 100})


def train_and_harm(config: TrainingConfig, harm: Callable[[], object], step: int) -> None:
    """Train, and call `harm` after an optimizer step."""
    numbers = iter(range(1, 1000))
    hook = register_optimizer_step_post_hook(lambda *_: harm() if next(numbers) == step else None)
    try:
        train(config)
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "images"])
def test_run_with_damaged_data_resumes_bit_for_bit_when_they_are_restored(
    folder: Path, run_config: TrainingConfig, kind: str, tmp_path: Path
) -> None:
    if kind == "parquet":
        save_parquet(folder, [4, 4, 4, 4])
        path = folder / f"train-{np.random.default_rng((run_config.seed, 11, 0)).permutation(4)[3]:05}.parquet"
        content = path.read_bytes()
        harm = lambda: path.write_bytes(content[: len(content) // 2])  # noqa: E731
    else:
        save_folder(folder, 16)
        path = folder / "odd" / "0007.png"
        content, harm = path.read_bytes(), path.unlink
    train(replace(run_config, output_dir=str(tmp_path / "whole")))
    message = rf"{re.escape(str(path))}.* cannot be read: .*; put it back as it was"
    with pytest.raises(RunError, match=message) as raised:
        train_and_harm(run_config, harm, 1)
    message = str(raised.value)
    assert "\n" not in message
    step = re.search(r"ends after step (\d).*; the same command .*--resume_from_checkpoint latest resumes", message)[1]
    assert verify(Path(run_config.output_dir) / f"checkpoint-{step}") is None
    resumed = replace(run_config, resume_from_checkpoint="latest")
    with pytest.raises(UsageError, match="whole parquet files" if kind == "parquet" else "trained on other images"):
        train(resumed)
    path.write_bytes(content)
    train(resumed)
    assert not differences(tmp_path / "whole", Path(run_config.output_dir))


@pytest.mark.slow
def test_run_skips_images_that_vanish(folder: Path, run_config: TrainingConfig) -> None:
    save_folder(folder, 16)
    vanished = [folder / "odd" / "0007.png", folder / "even" / "0012.png"]
    config = replace(run_config, on_bad_image="skip", max_train_steps=8)
    train_and_harm(config, lambda: [path.unlink() for path in vanished], 4)
    facts = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert facts["data"]["num_images"] == 16
    assert facts["data"]["num_bad_images"] == 2
