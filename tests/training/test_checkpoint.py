"""Checkpoints are whole or absent: damage is found and said, and never costs more than one of them."""

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.checkpoint import (
    FORMAT,
    Progress,
    TrainingState,
    checkpoint_bytes,
    find_checkpoint,
    load_checkpoint,
    read_progress,
    save_checkpoint,
    verify,
)
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.parsing import save_config
from tests.support.forks import python
from tests.support.networks import tiny_unet_config
from tests.support.runs import differences

ROOT = Path(__file__).parents[2]
PROGRESS = Progress(4, 40, 1.5, 0, 10, 10, 24, "abc", losses=[[0.1, 3.0]], scaler={"scale": 2.0**16})


@pytest.fixture
def state(make_unet):
    return new_state(make_unet, seed=0)


def new_state(make_unet, seed):
    unet = make_unet(seed=seed).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.01, fused=True)
    ema = EMA(list(unet.parameters()), ["halflife-10", "std-0.05"])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        unet(x, 5).sample.square().mean().backward()
        optimizer.step()
        ema.update(list(unet.parameters()), {"halflife-10": 0.5, "std-0.05": 0.9})
    return TrainingState(unet, optimizer, ema)


def everything(state):
    moments = [t for p in state.unet.parameters() for _, t in sorted(state.optimizer.state[p].items())]
    averages = [t for average in state.ema.averages.values() for t in average]
    return [*(p.detach() for p in state.unet.parameters()), *moments, *averages]


def save(state, folder, step, total_limit=None):
    problem = save_checkpoint(state, replace(PROGRESS, step=step), folder, total_limit, is_main_process=True)
    assert problem is None
    return folder / f"checkpoint-{step}"


@pytest.mark.slow
def test_load_checkpoint_restores_every_bit(state, make_unet, tmp_path):
    checkpoint = save(state, tmp_path, 4)
    other = new_state(make_unet, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(everything(state), everything(other), strict=True))
    load_checkpoint(other, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(everything(state), everything(other), strict=True))
    assert read_progress(checkpoint) == PROGRESS
    fresh = make_unet(seed=2)
    fresh = TrainingState(
        fresh,
        torch.optim.AdamW(fresh.parameters(), fused=True),
        EMA(list(fresh.parameters()), list(state.ema.averages)),
    )
    load_checkpoint(fresh, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(everything(state), everything(fresh), strict=True))


@pytest.mark.slow
def test_checkpoint_contains_no_code(state, tmp_path):
    """Tensors in safetensors, the rest in JSON; no pickle under any name."""
    files = [p for p in save(state, tmp_path, 4).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
    UNet2DModel.from_pretrained(tmp_path / "checkpoint-4", subfolder="unet_ema")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(path):
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "progress.json", "optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"],
)
def test_find_checkpoint_passes_over_a_damaged_newest(state, tmp_path, name, damage):
    save(state, tmp_path, 4)
    damage(save(state, tmp_path, 6) / name)
    found, passed_over = find_checkpoint(tmp_path, "latest")
    assert found == tmp_path / "checkpoint-4"
    assert len(passed_over) == 1
    assert passed_over[0].startswith("checkpoint-6 is passed over: ")
    if name != "manifest.json" or damage == lose:
        assert Path(name).name in passed_over[0]
    with pytest.raises(UsageError, match=r"no checkpoint .* can be resumed from: checkpoint-6 is passed over"):
        find_checkpoint(tmp_path, "checkpoint-6")


def test_find_checkpoint_refuses_only_damaged_ones(state, tmp_path):
    assert find_checkpoint(tmp_path, "latest") == (None, [])
    truncate(save(state, tmp_path, 4) / "progress.json")
    with pytest.raises(UsageError, match=r"checkpoint-4 is passed over: progress.json has \d+ bytes, not \d+.*backup"):
        find_checkpoint(tmp_path, "latest")


def test_verify_names_another_format(state, tmp_path):
    checkpoint = save(state, tmp_path, 4)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert verify(checkpoint) == f"it has format 1, not {FORMAT}, of another version of hf_ddpm"


@pytest.mark.slow
def test_pruning_counts_whole_checkpoints_only(state, tmp_path):
    """Two that were damaged later do not crowd out the last good one."""
    for step in (1, 2, 3):
        save(state, tmp_path, step)
    for step in (2, 3):
        truncate(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors")
    save(state, tmp_path, 4, total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    save(state, tmp_path, 5, total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.slow
def test_pruning_keeps_no_damaged_newer_checkpoint(state, tmp_path):
    save(state, tmp_path, 4)
    flip_a_bit(save(state, tmp_path, 6) / "optimizer.safetensors")  # of its right size
    save(state, tmp_path, 5, total_limit=1)
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "checkpoint-5"


def test_load_checkpoint_refuses_weights_that_are_not_finite(state, make_unet, tmp_path):
    with torch.no_grad():
        state.unet.conv_in.bias[0] = math.nan
    save(state, tmp_path, 1)
    with pytest.raises(UsageError, match=r"^checkpoint-1 must have finite weights"):
        load_checkpoint(new_state(make_unet, 1), tmp_path / "checkpoint-1")


def test_load_checkpoint_refuses_another_shape(state, make_unet, tmp_path):
    checkpoint = save(state, tmp_path, 4)
    unet = make_unet(channels=1)
    with pytest.raises(UsageError, match="checkpoint-4 is of another network"):
        load_checkpoint(TrainingState(unet, torch.optim.AdamW(unet.parameters()), None), checkpoint)


@pytest.mark.slow
def test_save_checkpoint_replaces_a_damaged_one_of_the_same_step(state, tmp_path):
    truncate(save(state, tmp_path, 4) / "optimizer.safetensors")
    assert verify(save(state, tmp_path, 4)) is None


def test_resume_refuses_another_network_or_average(state, make_unet, tmp_path):
    checkpoint = save(state, tmp_path, 4)
    larger = make_unet(
        block_out_channels=[8, 8, 16],
        **{
            "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        },
    )
    with pytest.raises(UsageError, match=r"checkpoint-4 is of another network: block_out_channels was \[8, 16\], got"):
        load_checkpoint(TrainingState(larger, torch.optim.AdamW(larger.parameters()), None), checkpoint)
    unknown = replace(state, ema=EMA(list(state.unet.parameters()), ["halflife-10", "halflife-99"]))
    with pytest.raises(UsageError, match="checkpoint-4 does not hold 'halflife-99/"):
        load_checkpoint(unknown, checkpoint)


# A process with its own mounts: what `unshare --user --map-root-user --mount` makes, CLONE_NEWUSER | CLONE_NEWNS.
FULL_DISK = """
import contextlib, ctypes, os, shutil, subprocess
from hf_ddpm.cli import app

ids = {{"uid_map": f"0 {{os.geteuid()}} 1", "gid_map": f"0 {{os.getegid()}} 1"}}
assert ctypes.CDLL(None).unshare(0x10000000 | 0x00020000) == 0
for name, text in {{"setgroups": "deny", **ids}}.items():
    with open(f"/proc/self/{{name}}", "w") as file:
        file.write(text)

def mount(folder, kilobytes, *options):
    options = ",".join([*options, f"size={{kilobytes}}k"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

def run(log, *arguments):
    with open(log, "w") as file, contextlib.redirect_stderr(file):
        try:
            app(["train", "--config", "config.yaml", *arguments])
        except SystemExit as end:
            return end.code

os.mkdir("disk"), os.mkdir("no_room")
mount("no_room", {smaller})
assert run("no_room.log", "--output_dir", "no_room/run") == 1
mount("disk", {small})
assert run("first.log") == 1
with open("left.txt", "w") as file:
    file.write(" ".join(os.listdir("disk/run")))
shutil.copytree("disk/run/checkpoint-2", "kept")
mount("disk", 65536, "remount")
assert run("second.log", "--resume_from_checkpoint", "latest") == 0
shutil.copytree("disk/run", "finished")
"""


@pytest.mark.slow
def test_full_disk_costs_the_newest_checkpoint_only(tiny_settings, tmp_path):
    """A file system with room for one checkpoint: the run continues to its end, says what is missing, and once there
    is room it ends as if there always had been."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*namespace, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a tmpfs")
    (tmp_path / "two_levels.json").write_text(json.dumps(tiny_unet_config(channels=1)))
    settings = {**tiny_settings, "model_config_name_or_path": str(tmp_path / "two_levels.json")}
    settings |= {"checkpointing_steps": 2, "ema_snapshots": 0, "cpu_threads_per_process": 1}
    whole = TrainingConfig(**settings)
    train(whole)
    files = [p for p in Path(whole.output_dir).rglob("*") if p.is_file()]
    one = sum(p.stat().st_size for p in files if p.parts[-2] == "checkpoint-6" or p.parts[-3] == "checkpoint-6")
    save_config(replace(whole, output_dir="disk/run"), tmp_path / "config.yaml")
    guide = sum(p.stat().st_size for p in files if p.parts[-2] == "guide")
    sizes = {"small": int(1.7 * one + guide) // 1024, "smaller": int(1.4 * one + guide) // 1024}
    process = python(["-c", FULL_DISK.format(**sizes)], tmp_path, None, tmp_path / "said.txt")
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    log = (tmp_path / "first.log").read_text()
    no_room = (tmp_path / "no_room.log").read_text()
    assert "a file could not be written, the run continues" in no_room
    assert "Traceback" not in no_room
    assert "checkpoint-4 could not be written, the run continues: [Errno 28] No space left on device" in log
    assert "error: the last checkpoint could not be written" in log
    assert "Free space on that disk" in log
    assert "Traceback" not in log
    names = (tmp_path / "left.txt").read_text().split()
    assert [name for name in names if "checkpoint" in name] == ["checkpoint-2"]
    assert verify(tmp_path / "kept") is None
    assert "resumes from checkpoint-2" in (tmp_path / "second.log").read_text()
    assert not differences(tmp_path / "finished", Path(whole.output_dir))


def test_process_that_does_not_write_keeps_nothing_of_a_sharded_checkpoint(state, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = checkpoint_bytes(state, PROGRESS, is_main_process=True)
        mesh = init_device_mesh("cpu", (1,))
        for module in state.unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                sharded = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
                state.optimizer.state[sharded] = state.optimizer.state.pop(parameter)
                setattr(module, name, sharded)
        assert checkpoint_bytes(state, PROGRESS, is_main_process=True) == whole > 10**5
        # Its files hold the config of the network, and the progress.
        assert checkpoint_bytes(state, PROGRESS, is_main_process=False) < 10**4
    finally:
        dist.destroy_process_group()


def test_run_goes_on_when_a_checkpoint_cannot_be_written(state, tmp_path):
    """A file stands where the folder is to be: no permission can be taken away from a test that runs as root."""
    save(state, tmp_path, 4)
    (tmp_path / "partial-checkpoint-6").write_text("")
    progress = replace(PROGRESS, step=6)
    problem = save_checkpoint(state, progress, tmp_path, 1, is_main_process=True)
    assert "partial-checkpoint-6" in problem
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-4", [])
