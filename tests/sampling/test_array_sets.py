"""Records of samples of arrays name the timesteps that the model takes by default."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_ddpm import DDPMPipeline, evaluate
from hf_ddpm.data.config import DataConfig
from hf_ddpm.sampling.image_set import write_samples
from tests.support.array_models import fields, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def visited(model: Path, scheduler: str, num_inference_steps: int) -> list[int]:
    """Return the timesteps at which a pipeline really evaluates its network."""
    pipeline = DDPMPipeline.from_pretrained(model).use(scheduler, num_inference_steps)
    pipeline.set_progress_bar_config(disable=True)
    _, trajectory = pipeline(output_type="np", trajectory=True, return_dict=False)
    return [step.timestep for step in trajectory]


@pytest.mark.slow
def test_set_records_the_timesteps_that_arrays_take_by_default(model: Path, tmp_path: Path) -> None:
    for scheduler in ("unipc", "ddpm"):
        out = tmp_path / scheduler
        write_samples(str(model), out, num_images=2, num_inference_steps=8, scheduler=scheduler)
        record = json.loads((out / "samples.json").read_text())
        assert record["timesteps"] is None  # none were searched
        wanted = visited(model, "unipc", 8) if scheduler == "unipc" else None
        assert record.get("default_timesteps") == wanted
        # A set of before, which does not record them, may grow; one of other timesteps may not.
        del record["timesteps"]
        (out / "samples.json").write_text(json.dumps({k: v for k, v in record.items() if k != "default_timesteps"}))
        write_samples(str(model), out, num_images=3, num_inference_steps=8, scheduler=scheduler)
    (tmp_path / "unipc/samples.json").write_text(json.dumps({**record, "default_timesteps": [3]}))
    with pytest.raises(ValueError, match="default_timesteps"):
        write_samples(str(model), tmp_path / "unipc", num_images=4, num_inference_steps=8, scheduler="unipc")


@pytest.mark.slow
def test_evaluation_records_them_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "fields").mkdir()
    np.save(tmp_path / "fields/all.npy", fields(20))
    data = DataConfig(dataset_name=str(tmp_path / "fields"), cache_dir=str(tmp_path / "cache"))
    settings = {"num_images": 16, "num_inference_steps": (8,), "schedulers": ("unipc",), "device": "cpu"}
    evaluate(model, data=data, metrics=("values",), out=tmp_path / "out", **settings)
    (row,) = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    assert row["sampling"]["timesteps"] is None
    assert row["sampling"]["default_timesteps"] == visited(model, "unipc", 8)
    assert "searched" not in (tmp_path / "out/README.md").read_text()
