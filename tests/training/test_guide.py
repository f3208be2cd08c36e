"""A run keeps an early average of its network, which guides the model of its end, and the commands use it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from hf_ddpm import DDPMPipeline, UsageError
from hf_ddpm.runtime.run_files import UPLOADED, run_files
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.slow
def test_guide_is_the_average_after_an_eighth_of_the_run(tiny_settings):
    settings = {**tiny_settings, "max_train_steps": 8, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    pipeline: Any = train(TrainingConfig(**settings))
    folder = Path(settings["output_dir"])
    guide = DDPMPipeline.from_pretrained(folder).load_guide().guide
    assert same(guide, UNet2DModel.from_pretrained(folder / "checkpoint-1" / "unet_ema"))
    assert not same(guide, pipeline.unet)
    assert {"guide/*.json", "guide/*.safetensors"} <= set(UPLOADED)
    assert {path.name for path in run_files(folder) if path.parent.name == "guide"} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.slow
def test_run_without_averages_keeps_no_guide(tiny_settings):
    config = TrainingConfig(**{**tiny_settings, "use_ema": False, "ema_snapshots": 0})
    train(config)
    assert not Path(config.output_dir, "guide").exists()


@pytest.mark.slow
def test_commands_guide_by_the_models_own_network_or_by_another_model(tiny_settings, tmp_path):
    config = TrainingConfig(**tiny_settings)
    train(config)
    model = config.output_dir

    def guidance_of(name: str, **settings: Any) -> dict[str, Any]:
        write_samples(model, tmp_path / name, num_images=2, num_inference_steps=3, device="cpu", **settings)
        return json.loads((tmp_path / name / "samples.json").read_text())["guidance"]

    own = guidance_of("own", guidance_scale=2.0)
    assert own["scale"] == 2.0
    assert len(own["weaker"]) == 64
    other = replace(config, output_dir=str(tmp_path / "other"), seed=1)
    train(other)
    named = guidance_of("named", guidance_scale=2.0, guidance_interval=(0.1, 4.0), guidance_model=other.output_dir)
    assert named["interval"] == [0.1, 4.0]
    assert named["weaker"] != own["weaker"]
    assert (tmp_path / "own/000000.png").read_bytes() != (tmp_path / "named/000000.png").read_bytes()
    assert guidance_of("plain") is None
    with pytest.raises(ValueError, match="holds samples with guidance=None, got guidance"):
        guidance_of("plain", guidance_scale=2.0)
    train(replace(other, output_dir=str(tmp_path / "noise"), prediction_type="epsilon"))
    with pytest.raises(UsageError, match=r"guidance_model must have the model's prediction_type, v_pred.*, got eps"):
        guidance_of("refused", guidance_scale=2.0, guidance_model=str(tmp_path / "noise"))
