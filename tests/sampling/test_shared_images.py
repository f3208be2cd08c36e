"""Edits and samples of images whose work several processes share: the files are those of one process."""

import os
import socket
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.condition import Condition
from hf_ddpm.sampling.conditional_set import sample_from_images
from hf_ddpm.sampling.edit_set import edit_images
from tests.support.forks import Process
from tests.support.image_data import save_grays
from tests.support.networks import smallest_unet_config

COMMANDS = {"edit": edit_images, "sample": sample_from_images}
NUM_IMAGES = 19


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model for each command, images, and masks for them."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(UNet2DModel(**smallest_unet_config(1)), scheduler).save_pretrained(folder / "edit")
    conditional = ConditionalDDPMPipeline(UNet2DModel(**smallest_unet_config(1, in_channels=2)), scheduler)
    conditional.condition = Condition(1, super_resolution=2)
    conditional.save_pretrained(folder / "sample")
    save_grays(folder / "images", NUM_IMAGES)
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 4))
    mask.save(folder / "mask.png")
    return folder


def work(command: str, arguments: dict, num_threads: int, environment: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ |= environment
    torch.set_num_threads(num_threads)
    COMMANDS[command](**arguments)


def files_of(command: str, arguments: dict, num_processes: int) -> dict[str, bytes]:
    """Return what a command writes in some processes; one has two threads, and several have one each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}"}
    children = []
    for rank in range(num_processes):
        place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_processes}", **environment}
        num_threads, variables = (2, {}) if num_processes == 1 else (1, place)
        children.append(Process(target=work, args=(command, arguments, num_threads, variables)))
        children[-1].start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * num_processes
    out = Path(arguments["out"])
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("edit", {}),
        ("edit", {"mask": "mask.png"}),
        ("sample", {"scheduler": "ddpm"}),
    ],
)
def test_files_are_the_same_for_any_number_of_processes(folder, tmp_path, command, settings):
    written = []
    for num_processes in (1, 2, 3):
        arguments = {"model": str(folder / command), "image": folder / "images", "device": "cpu", **settings}
        arguments |= {"num_inference_steps": 2, "out": tmp_path / f"{num_processes}"}
        if "mask" in settings:
            arguments["mask"] = folder / settings["mask"]
        written.append(files_of(command, arguments, num_processes))
    assert len(written[0]) == NUM_IMAGES + 1
    assert written[0] == written[1] == written[2]


@pytest.mark.slow
def test_processes_with_fewer_images_than_processes_write_them_all(folder, tmp_path):
    arguments = {"model": str(folder / "edit"), "image": folder / "images/000.png", "num_inference_steps": 2}
    files = files_of("edit", {**arguments, "device": "cpu", "out": tmp_path / "out"}, 2)
    assert sorted(files) == ["000.png", "edits.png"]
