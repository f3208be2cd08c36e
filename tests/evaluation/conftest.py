"""A small model of digits in the folder of a run and as stock diffusers writes it, and its evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.feature_weights import NETWORKS
from hf_ddpm.hub import card as cards
from hf_ddpm.runtime.files import sha256
from hf_ddpm.training.parsing import save_config
from tests.support.evaluations import config_of
from tests.support.inception import save_inception
from tests.support.networks import smallest_unet_config


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of `datasets`."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def published_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("network") / "inception.pt")


@pytest.fixture
def network_file(published_inception: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a small network of 8 features, which passes for the published Inception."""
    inception = replace(NETWORKS["inception"], sha256=sha256(published_inception))
    monkeypatch.setitem(NETWORKS, "inception", inception)
    return published_inception


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with 300 digits of `train` and 120 of `test`."""
    root = tmp_path_factory.mktemp("data")
    images = load_images(DataConfig(dataset_name="digits", cache_dir=str(root / "cache")))
    for i in range(420):
        folder = root / "digits" / ("train" if i < 300 else "test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.image(i)[0]).save(folder / f"{i:04}.png")
    return root / "digits"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """The folder that stock diffusers writes, and nothing else."""
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(channels=1))
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
    scheduler = DDPMScheduler(
        20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def run(stock: Path, digits: Path) -> Path:
    """The same model in the folder of a run of ours."""
    folder = stock.with_name("run")
    shutil.copytree(stock, folder)
    config = config_of(digits)
    save_config(config, folder / "config.yaml")
    data = {"name": "digits", "fingerprint": load_images(config).fingerprint}
    (folder / "run.json").write_text(json.dumps({"data": data}))
    cards.write_card(folder)
    return folder


@pytest.fixture
def of_classes(tmp_path: Path) -> Path:
    """A model of two classes."""
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(channels=1), num_class_embeds=2)
    DDPMPipeline(unet, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "classes")
    return tmp_path / "classes"


@pytest.fixture
def measure(network_file: Path) -> Callable[..., dict[str, Any]]:
    """`evaluate` with few images and steps."""

    def measure(model: Path, **settings: Any) -> dict[str, Any]:
        small = {"num_images": 40, "num_inference_steps": [2], "batch_size": 16, "device": "cpu"}
        if not {"network", "network_path"} & settings.keys():
            small["network_path"] = network_file
        return evaluate(model, **(small | settings))

    return measure


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the network is evaluated."""
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_, **__: pytest.fail("sampled before everything was checked"))
