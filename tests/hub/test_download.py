"""Models come back from the Hub: ours with stock diffusers and with us, and those that stock diffusers saved."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from huggingface_hub import HfApi, ModelCard, constants
from typer.testing import CliRunner

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.condition import Condition, read_condition
from hf_ddpm.evaluation.feature_weights import NETWORKS
from hf_ddpm.hub.download import find_model, is_hub_id
from hf_ddpm.hub.upload import push
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import sha256, weights_sha256
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.hub_runs import NAME, OTHER, UPLOAD_WARNING, forget_connections, sample_images, save_model
from tests.support.hub_server import HubServer
from tests.support.inception import save_inception
from tests.support.networks import smallest_unet_config

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.mark.slow
def test_model_that_makes_images_from_images_is_found_and_refused_by_stock(server: HubServer, tmp_path: Path):
    unet = UNet2DModel(**smallest_unet_config(channels=1, in_channels=4))
    pipeline = ConditionalDDPMPipeline(unet, DDPMScheduler())
    pipeline.condition = Condition(3, column="drawing")
    pipeline.save_pretrained(tmp_path)
    push(tmp_path, NAME)
    folder, repo_id = find_model(NAME)
    assert repo_id == NAME
    assert read_condition(folder) == pipeline.condition
    assert weights_sha256(folder) == weights_sha256(tmp_path)
    assert ConditionalDDPMPipeline.from_pretrained(NAME).condition == pipeline.condition
    with pytest.raises(ValueError, match=r"expected.*unet"):
        diffusers.DDPMPipeline.from_pretrained(NAME)
    with pytest.raises(AttributeError, match="ConditionalDDPMPipeline"):
        diffusers.DiffusionPipeline.from_pretrained(NAME)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # its successor is too new
def test_private_repository_is_loaded_as_its_folder(server: HubServer, run: Path, monkeypatch: Any):
    """Stock diffusers loads it, too: tests/system/test_stock.py."""
    push(run, NAME)
    index = json.loads(server.repo(NAME).files["model_index.json"])
    assert {name: part for name, part in index.items() if not name.startswith("_")} == {
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert index["_class_name"] == "DDPMPipeline"
    assert not [name for name in server.repo(NAME).files if name.endswith((".py", ".bin", ".pkl"))]
    pipeline = DDPMPipeline.from_pretrained(NAME)
    assert type(pipeline.scheduler) is DDPMScheduler
    expected = sample_images(DDPMPipeline.from_pretrained(run))
    assert np.array_equal(sample_images(pipeline), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert DDPMPipeline.from_pretrained(NAME, torch_dtype=dtype).unet.dtype is dtype
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_connections()
    assert np.array_equal(sample_images(DDPMPipeline.from_pretrained(NAME)), expected)


@pytest.mark.slow
def test_loading_a_private_repository_needs_its_token(server: HubServer, run: Path, tmp_path: Path, monkeypatch):
    push(run, NAME)
    for token in ("", OTHER):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{token}"))
        with pytest.raises(OSError, match="digits"):
            DDPMPipeline.from_pretrained(NAME)
        done = CliRunner().invoke(app, ["sample", NAME, "--out", str(tmp_path / "images")])
        assert done.exit_code == 2
        assert "it is not on the Hub, or private, which needs hf auth login" in done.stderr
        assert not (tmp_path / "images").exists()


def stock_scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(
        20, beta_start=0.005, beta_end=0.9, beta_schedule="linear", variance_type="fixed_large"
    )


@pytest.fixture(params=["folders", "flat"])
def foreign(server: HubServer, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """What stock wrote, with weights as a pickle, on the Hub as bob/stock; `flat` as it was in its early days."""
    folder = save_model(tmp_path / "stock", scheduler=stock_scheduler(), safe_serialization=False)
    if request.param == "flat":
        for part in ("unet", "scheduler"):
            for path in (folder / part).iterdir():
                path.rename(folder / path.name)
            (folder / part).rmdir()
    api = HfApi(token=OTHER)
    api.create_repo("bob/stock")
    api.upload_folder(repo_id="bob/stock", folder_path=folder)
    assert not list(folder.rglob("*.safetensors"))
    return folder


@pytest.mark.slow
def test_stock_repository_can_be_sampled_and_finetuned(
    foreign: Path, push_settings: dict[str, Any], tmp_path: Path, image_folder: Path
):
    expected = sample_images(diffusers.DDPMPipeline.from_pretrained(foreign))
    pipeline = DDPMPipeline.from_pretrained("bob/stock")
    assert type(pipeline.scheduler) is DDPMScheduler
    assert np.array_equal(sample_images(pipeline), expected)
    count = ["--num_images", "2", "--num_inference_steps", "3"]
    done = CliRunner().invoke(app, ["sample", "bob/stock", "--out", str(tmp_path / "images"), *count])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    del push_settings["model_config_name_or_path"], push_settings["ddpm_num_steps"]
    train(TrainingConfig(**{**push_settings, "init_from": "bob/stock", "push_to_hub": False, "hub_model_id": None}))
    run = Path(push_settings["output_dir"])
    assert ModelCard.load(run / "README.md").data.base_model == "bob/stock"
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["prediction_type"], written["ddpm_beta_schedule"]) == ("epsilon", "linear")


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")
def test_stock_repository_can_be_evaluated(foreign: Path, image_folder: Path, tmp_path: Path, monkeypatch: Any):
    path = save_inception(tmp_path / "inception.pt")
    monkeypatch.setitem(NETWORKS, "inception", replace(NETWORKS["inception"], sha256=sha256(path)))
    flags = ["--metrics", "kid", "--dataset_name", str(image_folder), "--cache_dir", str(tmp_path / "cache")]
    flags += ["--num_images", "8", "--num_inference_steps", "2", "--network", "inception"]
    out = tmp_path / "measured"
    command = ["evaluate", "bob/stock", *flags, "--network_path", str(path), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [row["metric"] for row in json.loads((out / "evaluation.json").read_text())["results"]] == ["kid"]


class Executes:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_not_executed(foreign: Path, push_settings: dict[str, Any], tmp_path: Path):
    path = next(foreign.rglob("*.bin"))
    executed = tmp_path / "executed"
    path.write_bytes(pickle.dumps({"conv_in.weight": Executes(executed)}))
    torch.save({"conv_in.weight": Executes(executed)}, tmp_path / "zip.bin")
    for content in (path.read_bytes(), (tmp_path / "zip.bin").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(path.name)):
            DDPMPipeline.from_pretrained(foreign)
        assert CliRunner().invoke(app, ["sample", str(foreign), "--out", str(tmp_path / "o")]).exit_code == 2
        assert not executed.exists()
    del push_settings["model_config_name_or_path"], push_settings["ddpm_num_steps"]
    with pytest.raises((OSError, UsageError)):
        train(
            TrainingConfig(**{**push_settings, "init_from": str(foreign), "push_to_hub": False, "hub_model_id": None})
        )
    assert not executed.exists()
    assert not Path(push_settings["output_dir"]).exists()


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("me/photos", True),
        ("google/ddpm-cifar10-32", True),
        ("digits", False),
        ("a/b/c", False),
        ("./photos", False),
        ("~/photos", False),
        ("me/größer", False),
        ("me/a--b", False),
        ("data/photos", False),
    ],
)
def test_is_hub_id_accepts_namespace_and_name_of_no_folder_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_id: bool
):
    (tmp_path / "data/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is is_id
