"""Waiting for the processes that load data: how long, for whom, and with which words."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hf_ddpm.data.shard_batches import BlockStart
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training import loader
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.loader import (
    DataWaitError,
    Loader,
    Watch,
    advance_stream,
    explain_loader_failure,
    merge_block_starts,
    next_batches,
)


class Waits(Dataset):
    """Items of which the second does not come before something is written into a pipe."""

    def __init__(self):
        self.read_end, self.write_end = os.pipe()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            os.read(self.read_end, 1)
        return torch.tensor(index)


@pytest.fixture
def waits(monkeypatch):
    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(loader, "SAY_SECONDS", 0.1)
    # How long torch waits for a batch before it looks whether a worker has died.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    dataset, others = Waits(), multiprocessing.active_children()
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=1))
    workers = [child for child in multiprocessing.active_children() if child not in others]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as `open_loader` does
    watch = Watch(workers, 1.0)
    yield Loader(batches, workers, watch), dataset
    watch.close()
    os.write(dataset.write_end, b"x")


@pytest.mark.slow
def test_wait_says_what_it_waits_for_and_ends(waits, capsys):
    opened, _ = waits
    assert next_batches(opened, 1, lambda: False) == ([torch.tensor(0)], None)
    capsys.readouterr()  # on a busy machine, the first one is waited for, too
    batches, failure = next_batches(opened, 2, lambda: False)
    assert batches == []
    assert isinstance(failure, DataWaitError)
    pid = opened.workers[0].pid
    said = capsys.readouterr().err
    assert said.count("no images have come for") == 1
    assert f"or the processes that load data, {pid}, are stuck; the run ends after" in said
    message = explain_loader_failure(failure, opened.workers)
    assert message.startswith("no images came for ")
    assert f"(max_data_wait_minutes) from the processes that load data, {pid}: is" in message
    opened.workers[0].join()
    assert opened.workers[0].exitcode


def test_wait_that_ends_well_changes_nothing(waits):
    opened, dataset = waits
    looks = []

    def look():
        looks.append(len(looks))
        if len(looks) == 4:
            os.write(dataset.write_end, b"x")
        return False

    batches, failure = next_batches(opened, 4, look)
    assert failure is None
    assert [int(batch) for batch in batches] == [0, 1, 2, 3]
    assert len(looks) >= 4


def test_wait_ends_when_the_run_is_asked_to_end(waits):
    opened, _ = waits
    assert next_batches(opened, 2, lambda: True) == ([], None)
    opened.workers[0].join()


def test_step_of_a_stream_notes_what_it_read_and_leaves_the_rest_as_it_is():
    """A run that is resumed has a block start for each worker of its first start; a step is read from a few."""
    starts = [BlockStart(substream, 70, 0, 0, 7) for substream in range(100)]
    stream = {"num_substreams": 100, "chunk_size": 4, "block_starts": [start._asdict() for start in starts]}
    first = Progress(3, 24, 1.0, 0, 8, 8, None, "", num_bad_images=2, stream=stream)
    read, progress = {}, first
    for element, num_bad in ((70, 0), (77, 1), (84, 0)):
        batches = [{"block_starts": [BlockStart(5, element, 0, 0, element)], "num_bad": num_bad}]
        progress = advance_stream(progress, read, batches)
        assert progress.stream is stream
    assert read == {5: BlockStart(5, 84, 0, 0, 84)}
    merged = merge_block_starts(Processes(), progress, first, read)
    starts[5] = BlockStart(5, 84, 0, 0, 84)
    assert merged.stream == {**stream, "block_starts": [start._asdict() for start in starts]}
    assert merged.num_bad_images == 3
