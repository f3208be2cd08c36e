"""What the processes of a run know of each other."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.config import TrainingConfig
from tests.support.runs import said, start


def tell(rank: int, size: int, folder: Path) -> None:
    """Writes what one of the processes gets to know."""
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

    raised = []
    for attempt in (
        lambda: processes.on_main(refuse),
        lambda: processes.gather(refuse_in_last),
        lambda: processes.require_equal(rank, "number"),
        lambda: processes.require_equal("all", "word"),
        lambda: processes.on_main(fail),
    ):
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            raised.append(str(error))
    told = {
        "rank": processes.rank,
        "gather": processes.gather(lambda: rank),
        "only_first": processes.on_main(lambda: f"of {rank}"),
        "any_of": [processes.any([False, rank == size - 1]), processes.any([False])],
        "raised": raised,
    }
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_all_processes_know_the_same(tmp_path):
    context = multiprocessing.get_context("forkserver")
    children = [context.Process(target=tell, args=(rank, 2, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "gather": [0, 1],
            "only_first": "of 0",
            "any_of": [[False, True], [False]],
            "raised": [
                "refused by 0",
                "refused by 1",
                (
                    "all processes must have the same number, but process 1 has other than process 0: give all "
                    "machines the same files, and start again"
                ),
                "Unsendable: of a class that others do not have",
            ],
        }


def test_processes_that_have_other_images_do_not_train(tiny_settings, tmp_path):
    config = TrainingConfig(**{**tiny_settings, "train_batch_size": 4})
    shutil.copytree(config.train_data_dir, tmp_path / "fewer")
    next((tmp_path / "fewer").glob("*.png")).unlink()
    assert start(config, 2, last=replace(config, train_data_dir=str(tmp_path / "fewer"))) == [1, 1]
    assert "all processes must have the same images, but process 1 has other than process 0" in said(config)
    assert not Path(config.output_dir).exists()


def test_all_processes_know_why_one_of_them_cannot_load(tiny_settings, tmp_path):
    config = TrainingConfig(**{**tiny_settings, "train_batch_size": 4})
    shutil.copytree(config.train_data_dir, tmp_path / "damaged")
    next((tmp_path / "damaged").glob("*.png")).write_bytes(b"no image")
    damaged = replace(config, train_data_dir=str(tmp_path / "damaged"))
    assert start(damaged, 2) == [1, 1]
    assert said(damaged).count("not an image that Pillow knows; repair or remove it") == 2


def test_one_process_asks_no_other(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("one process has no other")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in ("new_group", "all_gather_object", "all_reduce"):
            monkeypatch.setattr(dist, name, refuse)
        processes = Processes()
        assert (processes.rank, processes.size) == (0, 1)
        assert processes.gather(lambda: "mine") == ["mine"]
        assert processes.on_main(lambda: "mine") == "mine"
        assert processes.any([True, False]) == [True, False]
        with pytest.raises(ValueError, match="as it is"):
            processes.gather(lambda: (_ for _ in ()).throw(ValueError("as it is")))
    finally:
        dist.destroy_process_group()
