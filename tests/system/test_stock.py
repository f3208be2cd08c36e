"""A checkpoint is a plain diffusers checkpoint: both ways, in a process that cannot import hf_ddpm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from hf_ddpm import DDPMPipeline, DDPMScheduler
from tests.support.hub_runs import NAME, TOKEN, nowhere, sample_images, save_run
from tests.support.hub_server import HubServer, client_environment, run_client
from tests.support.networks import ATTENTION, smallest_unet_config

pytestmark = pytest.mark.slow  # all take the folders of a fixture that starts a process

T = 10

# With stock diffusers: loads a repository, with and without a network, and each folder; samples, and saves the images.
STOCK = """
import os, sys
sys.modules["hf_ddpm"] = None  # importing it raises ImportError
from importlib import reload
from pathlib import Path
import diffusers, huggingface_hub, numpy, torch
from huggingface_hub.utils import _http
torch.set_num_threads(1)
name_on_hub, nowhere, *folders = sys.argv[1:]

def load(name, loader, **settings):
    pipeline = getattr(diffusers, loader).from_pretrained(name, **settings)
    assert type(pipeline) is diffusers.DDPMPipeline and type(pipeline.scheduler) is diffusers.DDPMScheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

def sample(pipeline, out):
    generator = torch.Generator().manual_seed(0)
    num_steps = len(pipeline.scheduler.betas)
    images = pipeline(batch_size=2, generator=generator, num_inference_steps=num_steps, output_type="np").images
    numpy.save(out, images)

for state in ("online", "offline"):
    os.mkdir(state)
    if state == "offline":
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": nowhere}
        reload(huggingface_hub.constants)  # which reads the environment when it is imported
        assert huggingface_hub.constants.HF_HUB_OFFLINE and huggingface_hub.constants.ENDPOINT == nowhere
        (getattr(_http, "close_session", None) or _http.reset_sessions)()
    for loader in ("DDPMPipeline", "DiffusionPipeline"):
        sample(load(name_on_hub, loader), f"{state}/{loader}.npy")
    for dtype in (torch.float16, torch.bfloat16):
        assert load(name_on_hub, loader, torch_dtype=dtype).unet.dtype is dtype
for folder in map(Path, folders):
    for loader in ("DDPMPipeline", "DiffusionPipeline"):
        pipeline = load(folder, loader)
        try:
            sample(pipeline, folder / f"{loader}.npy")
        except ValueError as error:
            (folder / "error.txt").write_text(str(error))
pipeline.save_pretrained(folder.parent / "saved_by_stock")
"""
PUSH = f"""
from pathlib import Path
from hf_ddpm.hub.upload import push
push(Path("digits"), {NAME!r})
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "previous_sample": {"prediction_type": "previous_sample"},
    "learned_range": {"variance_type": "learned_range"},
    "v_prediction": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "oblong": {"timestep_spacing": "trailing"},
    "epsilon": {"timestep_spacing": "trailing"},  # the last: stock saves it, too
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines of ours, saved and, of a run, pushed; and then loaded by stock."""
    root = tmp_path_factory.mktemp("stock")
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        channels = 3 if name == "learned_range" else 1
        size = [8, 12] if name == "oblong" else 8
        out_channels = 2 * channels if name == "learned_range" else channels
        unet = diffusers.UNet2DModel(
            **smallest_unet_config(channels, sample_size=size, out_channels=out_channels, **ATTENTION)
        )
        DDPMPipeline(unet, DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", **settings)).save_pretrained(
            root / name
        )
    folders = [str(root / name) for name in SETTINGS]
    save_run(root / "digits")
    with HubServer(tokens={TOKEN: "alice"}) as hub:
        run_client(hub, PUSH, root, TOKEN)
        assert hub.repo(NAME).private
        environment = client_environment(hub, root / "hf-of-stock", TOKEN)
        command = [sys.executable, "-W", "ignore", "-c", STOCK, NAME, nowhere(), *folders]
        subprocess.run(command, cwd=root, env=environment, check=True)
    return root


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "previous_sample"])
def test_stock_samples_the_same_images(folder, name):
    pipeline = DDPMPipeline.from_pretrained(folder / name)
    assert type(pipeline.scheduler) is DDPMScheduler
    pipeline.set_progress_bar_config(disable=True)
    ours = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=T, output_type="np"
    ).images
    for loader in ("DDPMPipeline", "DiffusionPipeline"):
        assert np.array_equal(np.load(folder / name / f"{loader}.npy"), ours)


@pytest.mark.parametrize("state", ["online", "offline"])
def test_stock_loads_a_private_repository(folder, state):
    ours = sample_images(DDPMPipeline.from_pretrained(folder / "digits"))
    for loader in ("DDPMPipeline", "DiffusionPipeline"):
        assert np.array_equal(np.load(folder / state / f"{loader}.npy"), ours)


def test_stock_refuses_what_it_cannot_express(folder):
    assert "prediction_type given as previous_sample" in (folder / "previous_sample/error.txt").read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_model_index_names_diffusers_classes_only(folder, name):
    index = json.loads((folder / name / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert "diffusers" in LOADABLE_CLASSES
    assert "hf_ddpm" not in (folder / name / "scheduler/scheduler_config.json").read_text()
    assert not list(Path(folder / name).rglob("*.bin"))


def test_stock_checkpoint_is_loaded_as_ours(folder):
    pipeline = DDPMPipeline.from_pretrained(folder / "saved_by_stock")
    assert type(pipeline.scheduler) is DDPMScheduler
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=T, output_type="np"
    ).images
    assert np.array_equal(images, np.load(folder / "epsilon/DDPMPipeline.npy"))


def test_other_schedulers_stay_what_they_are(folder):
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "epsilon", subfolder="scheduler")
    pipeline = DDPMPipeline.from_pretrained(folder / "epsilon", scheduler=scheduler)
    assert pipeline.scheduler is scheduler
