"""A run's newest checkpoint on the Hub: whole, private, replaced, without a trace of the machine; and resumed from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_ddpm.runtime.errors import RunError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.hub_checkpoints import PLACE, is_private, stored_step
from tests.support.hub_runs import UPLOAD_WARNING
from tests.support.hub_server import HubServer
from tests.support.runs import differences

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture
def settings(push_settings: dict[str, Any]) -> dict[str, Any]:
    return {**push_settings, "hub_strategy": "checkpoint", "ema_snapshots": 3}


def end_after(step: int):
    """Return a callback that ends a run after a step: it then writes a checkpoint, and waits for the Hub."""

    def fail(event, run):
        if event.name == "log" and event.step == step:
            raise ValueError("the end")

    return fail


def train_until(step: int, config: TrainingConfig) -> None:
    with pytest.raises(RunError, match="the end"):
        train(config, callbacks=[end_after(step)])


@pytest.mark.slow
def test_run_resumes_on_an_empty_machine_to_the_same_bits(
    hub: HubServer, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unlimited = {name: value for name, value in settings.items() if "hub" not in name}
    train(TrainingConfig(**{**unlimited, "output_dir": str(tmp_path / "whole")}))
    config = TrainingConfig(**settings)
    train_until(5, config)
    assert f"checkpoint-5 is in {PLACE}" in capsys.readouterr().err
    assert is_private(hub)
    other = replace(config, output_dir=str(tmp_path / "other"), resume_from_checkpoint="hub")
    train(other)
    said = capsys.readouterr().err
    assert f"checkpoint-5 of {PLACE} is downloaded, " in said
    assert "the run resumes from checkpoint-5, after 20 images" in said
    assert not differences(tmp_path / "whole", Path(other.output_dir))
    assert stored_step(hub) == 6
