"""A data set that gives x_0 has the units of the model of arrays that a run begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline
from hf_ddpm.condition import Condition
from hf_ddpm.data.conditions import low_resolution_conditions
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.given import open_given
from hf_ddpm.training.conditions import conditions_of_batch
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.array_models import RANGE, fields, save_model


def test_low_resolution_of_x_0_is_that_of_the_arrays() -> None:
    """Not that of 8-bit images, which would differ by half a step of 1/255."""
    arrays = torch.from_numpy(fields(4))
    x_0 = RANGE.to_x_0(arrays)
    torch.testing.assert_close(RANGE.from_x_0(x_0), arrays, rtol=1e-6, atol=0)
    images = replace(open_given([*x_0.numpy()], DataConfig()), value_range=RANGE)
    run: Any = SimpleNamespace(condition=Condition(2, super_resolution=2), images=images)
    conditions = conditions_of_batch(run, {}, x_0)
    assert conditions is not None
    torch.testing.assert_close(conditions, low_resolution_conditions(arrays, 2, RANGE), rtol=0, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "previous_sample"])
def test_x_0_keeps_the_units_of_the_model_of_arrays(tmp_path: Path, prediction_type: str, capsys: Any) -> None:
    model = save_model(tmp_path / "model")
    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    pipeline.save_pretrained(model)
    x_0 = RANGE.to_x_0(torch.from_numpy(fields(4)))
    seen = []

    def objective(network: Any, batch: torch.Tensor, class_labels: Any = None, **draws: Any) -> torch.Tensor:
        seen.append(batch.clone())
        return (network(batch, draws["timesteps"]).sample - batch).square().flatten(1).mean(1)

    config = TrainingConfig(
        init_from=str(model),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        train_batch_size=4,
        max_train_steps=1,
        lr_warmup_steps=0,
        eval_batch_size=2,
        cpu_threads_per_process=1,
        ema_snapshots=0,
    )
    train(config, dataset=[*x_0.numpy()], objective=objective)
    assert f"-1 and 1 stand for what they do in the model in init_from: {RANGE}" in capsys.readouterr().err
    # They are trained on as they are, and come back in the units of the model.
    assert sorted(each.numpy().tobytes() for each in seen[0]) == sorted(each.numpy().tobytes() for each in x_0)
    tuned = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert tuned.value_range == RANGE
    tuned.set_progress_bar_config(disable=True)
    values = tuned(batch_size=1, output_type="np").images
    assert values.dtype == np.float32
    assert ((values >= RANGE.low) & (values <= RANGE.high)).all()
    assert (tmp_path / "run/figures/samples.png").is_file()
