"""Processes: how they share work, and how all of them learn what one of them computed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_ddpm.runtime.processes import Processes, join_processes
from hf_ddpm.training.config import TrainingConfig
from tests.support.forks import Process
from tests.support.runs import said, start


def of_size(rank: int, size: int) -> Processes:
    """Return processes that only share work."""
    processes = Processes()
    processes.rank, processes.size = rank, size
    return processes


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (64, 4), (3, 4), (0, 2)])
def test_shares_are_all_items_in_order_and_of_almost_one_length(count, size):
    shares = [of_size(rank, size).split(count) for rank in range(size)]
    assert [item for share in shares for item in share] == [*range(count)]
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (64, 4), (3, 4), (1, 4)])
def test_even_shares_begin_with_the_share_and_have_one_length(count, size):
    for rank in range(size):
        processes = of_size(rank, size)
        share = processes.split_evenly(count)
        assert share[: len(processes.split(count))] == [*processes.split(count)]
        assert len(share) == -(-count // size)
        assert set(share) <= {*range(count)}


def write_what_one_learns(rank: int, size: int, folder: Path) -> None:
    """Write what the process of this rank learns from the others."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    processes = Processes(timedelta(minutes=1))

    def refuse() -> None:
        raise ValueError(f"refused by {rank}")

    def refuse_in_last() -> None:
        if rank == size - 1:
            refuse()

    class Unsendable(Exception):
        pass

    def fail() -> None:
        raise Unsendable("of a class that others do not have")

    def refuse_item(item: int) -> int:
        if item == 3:
            raise ValueError(f"refused item {item}")
        return item

    raised = []
    for attempt in (
        lambda: processes.on_main(refuse),
        lambda: processes.gather(refuse_in_last),
        lambda: processes.require_equal(rank, "number"),
        lambda: processes.require_equal("all", "word"),
        lambda: processes.on_main(fail),
        lambda: processes.map(refuse_item, 5, "Items"),
        lambda: processes.main_then_rest(refuse_in_last),
    ):
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            raised.append(str(error))
    items = torch.tensor(processes.split_evenly(5))
    learned = {
        "rank": processes.rank,
        "gather": processes.gather(lambda: rank),
        "map": [processes.map(lambda item: f"{item} by {rank}", count, "Items") for count in (3, 1)],
        "gather_rows": processes.gather_rows(torch.stack([items, items**2], dim=1), 5).tolist(),
        "on_main": processes.on_main(lambda: f"of {rank}"),
        "any": [processes.any([False, rank == size - 1]), processes.any([False])],
        "raised": raised,
    }
    # A gather would send the value once for each process.
    dist.all_gather_object = None  # type: ignore[assignment]
    learned["without a gather"] = processes.on_main(lambda: f"of {rank}")
    (folder / f"{rank}.json").write_text(json.dumps(learned))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_learn_the_same(tmp_path):
    children = [Process(target=write_what_one_learns, args=(rank, 2, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "gather": [0, 1],
            "map": [["0 by 0", "1 by 0", "2 by 1"], ["0 by 0"]],
            "gather_rows": [[i, i**2] for i in range(5)],
            "on_main": "of 0",
            "any": [[False, True], [False]],
            "raised": [
                "refused by 0",
                "refused by 1",
                (
                    "all processes must have the same number, but process 1 differs from process 0: "
                    "give all machines the same files, and start again"
                ),
                "Unsendable: of a class that others do not have",
                "refused item 3",
                "refused by 1",
            ],
            "without a gather": "of 0",
        }


@pytest.mark.slow
def test_training_rejects_processes_with_different_images(tiny_settings, tmp_path):
    config = TrainingConfig(**{**tiny_settings, "train_batch_size": 4})
    shutil.copytree(str(config.train_data_dir), tmp_path / "fewer")
    next((tmp_path / "fewer").glob("*.png")).unlink()
    assert start(config, 2, last=replace(config, train_data_dir=str(tmp_path / "fewer"))) == [1, 1]
    assert "all processes must have the same images, but process 1 differs from process 0" in said(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_all_processes_report_why_one_of_them_cannot_load(tiny_settings, tmp_path):
    config = TrainingConfig(**{**tiny_settings, "train_batch_size": 4})
    shutil.copytree(str(config.train_data_dir), tmp_path / "damaged")
    next((tmp_path / "damaged").glob("*.png")).write_bytes(b"no image")
    damaged = replace(config, train_data_dir=str(tmp_path / "damaged"))
    assert start(damaged, 2) == [1, 1]
    assert said(damaged).count("not an image that Pillow knows; repair or remove it") == 2


def test_one_process_communicates_with_no_other(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("one process has no other")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in ("new_group", "all_gather_object", "broadcast_object_list", "all_reduce"):
            monkeypatch.setattr(dist, name, refuse)
        processes = Processes()
        assert (processes.rank, processes.size) == (0, 1)
        assert processes.gather(lambda: "mine") == ["mine"]
        assert processes.on_main(lambda: "mine") == "mine"
        assert processes.map(lambda item: item**2, 3, "Items") == [0, 1, 4]
        rows = torch.arange(6).view(3, 2)
        assert torch.equal(processes.gather_rows(rows, 3), rows)
        assert processes.any([True, False]) == [True, False]
        with pytest.raises(ValueError, match="as it is"):
            processes.gather(lambda: (_ for _ in ()).throw(ValueError("as it is")))
    finally:
        dist.destroy_process_group()


def test_join_processes_leaves_a_process_group_as_it_is(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with join_processes() as processes:
            assert (processes.rank, processes.size) == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
