"""The timestep of a training image is independent of whatever else its position decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_ddpm.data.shards import open_stream
from hf_ddpm.objective import Objective
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.draws import draw
from tests.support.streams import numbers_of, save_parquet, stream_batches, stream_config

STEPS, BATCH, ACCUMULATION, PROCESSES, LOADERS = 80, 4, 2, 2, 2
COUNT = BATCH * ACCUMULATION * PROCESSES
NUM_FILES = PROCESSES * LOADERS
NUM_TIMESTEPS = 1024  # whole strata


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Of each image in a pass of one file for each loader: t of each density, and what its position decides."""
    folder = tmp_path_factory.mktemp("data") / "files"
    folder.mkdir()
    size = STEPS * COUNT // NUM_FILES
    save_parquet(folder, [size] * NUM_FILES, group=size)
    stream = open_stream(stream_config(folder))
    rows: list[tuple[Any, ...]] = []
    for rank in range(PROCESSES):
        config = TrainingConfig(train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, seed=3)
        runs = [
            SimpleNamespace(
                config=config,
                device=torch.device("cpu"),
                global_batch_size=COUNT,
                objective=Objective(DDPMScheduler(NUM_TIMESTEPS), density=density),
            )
            for density in ("stratified", "lognormal")
        ]
        layout = {"batch_size": BATCH, "accumulation_steps": ACCUMULATION, "num_processes": PROCESSES, "rank": rank}
        dataset = stream_batches(stream, **layout, num_steps=STEPS, num_substreams=NUM_FILES)
        for number, batch in enumerate(DataLoader(dataset, batch_size=None, num_workers=LOADERS)):
            step, micro = divmod(number, ACCUMULATION)
            slot = micro * PROCESSES + rank
            first, second = (draw(run, step, slot, batch["positions"], (1, 1, 1))[0] for run in runs)
            for i, image in enumerate(numbers_of(batch["pixels"])):
                decided = image // size, rank, micro, number % LOADERS, i
                rows.append((int(first[i]), int(second[i]), *decided, step, int(batch["positions"][i])))
    names = ("stratified", "lognormal", "file", "process", "part", "loader", "place", "step", "position")
    return dict(zip(names, np.array(rows).T, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("density", ["stratified", "lognormal"])
@pytest.mark.parametrize("name", ["file", "process", "part", "loader", "place"])
def test_timestep_is_independent_of(drawn, name, density):
    """By the distance of Kolmogorov and Smirnov, which is above 1.95 / sqrt(n) once in 1000 tests.

    Images of one step are no independent draws, so that n is the number of steps.
    """
    t, groups = drawn[density], drawn[name]
    everything = np.sort(t)
    for group in np.unique(groups):
        some = np.sort(t[groups == group])
        assert len(some) >= 300
        distance = np.abs(
            np.searchsorted(some, everything, side="right") / len(some)
            - np.searchsorted(everything, everything, side="right") / len(everything)
        ).max()
        assert distance < 1.95 / np.sqrt(STEPS)


@pytest.mark.slow
def test_timesteps_of_a_step_are_one_of_each_stratum(drawn):
    """Whoever evaluates which part of the batch."""
    for step in range(STEPS):
        t = drawn["stratified"][drawn["step"] == step]
        assert sorted(t * COUNT // NUM_TIMESTEPS) == list(range(COUNT))


@pytest.mark.slow
def test_strata_begin_anywhere(drawn):
    first = [
        drawn["stratified"][drawn["position"] == step * COUNT][0] * COUNT // NUM_TIMESTEPS for step in range(STEPS)
    ]
    assert set(first) == set(range(COUNT))
