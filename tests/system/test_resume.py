"""A run that is killed and resumed is, bit for bit, the run that was not; nor is it lost in any other way."""

import json
import math
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from hf_ddpm.runtime.errors import RunError
from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.seeds import seed_step
from hf_ddpm.training.checkpoint import verify
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.parsing import save_config
from tests.support.forks import Process, python
from tests.support.image_data import sort_into_kinds
from tests.support.networks import ATTENTION, smallest_unet_config
from tests.support.runs import SUSPEND, TWICE, UNREAD, WORKER, differences, said, start, trace

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def settings(tiny_settings, tmp_path):
    """All that has a state of its own, or draws random numbers."""
    model = tmp_path / "dropout.json"
    model.write_text(json.dumps(smallest_unet_config(channels=1, out_channels=2, dropout=0.2)))
    return {
        **tiny_settings,
        "model_config_name_or_path": str(model),
        "variance_type": "learned_range",
        "loss_weighting": "min_snr",
        "random_flip": True,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2,
        "dataloader_num_workers": 2,
        "max_train_steps": 8,
        "logging_steps": 3,  # not a divisor of the steps between checkpoints
        "checkpointing_steps": 2,
        "save_images_epochs": 1,
        "ema_halflife_images": [50, 500],
        "ema_snapshots": 4,
        "checkpoints_total_limit": 2,
    }


@pytest.fixture
def whole(settings, tmp_path):
    """A function: changes of the settings -> the run that is never killed, and the config of one that will be."""

    def make(num_processes: int = 1, **changes) -> tuple[Path, TrainingConfig]:
        config = TrainingConfig(**{**settings, **changes, "output_dir": str(tmp_path / "whole")})
        assert start(config, num_processes) == [0] * num_processes
        return Path(config.output_dir), replace(config, output_dir=str(tmp_path / "killed"))

    return make


def finish(config: TrainingConfig, num_processes: int = 1) -> Path:
    assert start(replace(config, resume_from_checkpoint="latest"), num_processes) == [0] * num_processes
    return Path(config.output_dir)


@pytest.mark.slow
def test_run_killed_at_any_moment_resumes_to_the_same_bits(whole, settings, image_folder, tmp_path):
    """In a step before and after the first checkpoint, within the writing of each file, and while it finishes."""
    network = json.loads(Path(settings["model_config_name_or_path"]).read_text())
    Path(settings["model_config_name_or_path"]).write_text(json.dumps({**network, **ATTENTION, "num_class_embeds": 3}))
    kinds = sort_into_kinds(image_folder, tmp_path / "kinds", ["dark", "light"])
    classes = {"train_data_dir": str(kinds), "label_column": "label", "class_dropout": 0.3}
    unkilled, config = whole(stable_target_images=7, save_figures=True, **classes)
    resume = replace(config, resume_from_checkpoint="latest")
    kills = [("step", 1), ("flush", 2), ("step", 3), ("flush", 9), ("step", 2), ("flush", 14), ("flush", 7)]
    for kill in kills:
        assert start(resume, 1, *kill) == [-signal.SIGKILL]
    assert not differences(finish(config), unkilled)


@pytest.mark.slow
def test_two_processes_killed_resume_to_the_same_bits(whole):
    unkilled, config = whole(num_processes=2, dataloader_num_workers=0, stable_target_images=7)
    for kill in ("flush", 5), ("step", 5):
        assert -signal.SIGKILL in start(replace(config, resume_from_checkpoint="latest"), 2, *kill)
    assert not differences(finish(config, 2), unkilled)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_streaming_run_killed_resumes_to_the_same_bits(whole, num_processes):
    unkilled, config = whole(num_processes, streaming=True, dataloader_num_workers=2, shuffle_buffer_images=5)
    for kill in ("step", 5), ("flush", 9):
        assert -signal.SIGKILL in start(replace(config, resume_from_checkpoint="latest"), num_processes, *kill)
    assert not differences(finish(config, num_processes), unkilled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signal_ends_the_run_after_a_checkpoint(whole, name):
    unkilled, config = whole(dataloader_num_workers=0, max_train_steps=4)
    assert start(config, 1, "step", 3, getattr(signal, name)) == [75]
    folder = Path(config.output_dir)
    assert (folder / "checkpoint-3").is_dir()
    last_line = said(config).strip().splitlines()[-1]
    assert last_line.startswith(f"{name} was noticed: the run ends after step 3. Its model samples: hf-ddpm sample ")
    assert last_line.endswith("; the same command with --resume_from_checkpoint latest resumes from step 3")
    # The model is the average that the checkpoint holds, the card says how far it is, and its pictures are there.
    model, average = (load_file(folder / part / WEIGHTS) for part in ("unet", "checkpoint-3/unet_ema"))
    assert model.keys() == average.keys()
    assert all(torch.equal(model[key], average[key]) for key in model)
    training = json.loads((folder / "run.json").read_text())["training"]
    assert (training["is_finished"], training["steps"], training["total_steps"]) == (False, 3, 4)
    card = (folder / "README.md").read_text()
    assert "stopped after 3 of 4 steps" in card
    assert "figures/samples.png" in card
    assert (folder / "figures/samples.png").is_file()
    assert not differences(finish(config), unkilled)
    assert json.loads((folder / "run.json").read_text())["training"]["is_finished"]
    assert "stopped after" not in (folder / "README.md").read_text()


def stop_and_be_killed(config: TrainingConfig, step: int) -> None:
    """End a run after a step, and kill it when it samples the pictures of its model."""
    is_asked = []

    def ask(event, _) -> None:
        if event.name == "log" and event.step == step:
            is_asked.append(True)
            signal.raise_signal(signal.SIGTERM)

    def kill(module, *_) -> None:
        if is_asked and isinstance(module, UNet2DModel) and not module.training:
            os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_hook(kill)
    train(config, callbacks=[ask])


@pytest.mark.slow
def test_stopped_run_shows_no_pictures_of_an_earlier_stop(settings):
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0, "logging_steps": 1})
    folder = Path(config.output_dir)
    assert start(config, 1, "step", 2, signal.SIGTERM) == [75]
    assert (folder / "figures/samples.png").is_file()
    process = Process(stop_and_be_killed, (replace(config, resume_from_checkpoint="latest"), 4))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "figures/samples.png").exists()
    card = (folder / "README.md").read_text()
    assert "stopped after 4 of 8 steps" in card
    assert "samples.png" not in card


@pytest.mark.slow
def test_output_that_nobody_reads_ends_the_run_after_a_checkpoint(whole):
    unkilled, config = whole(dataloader_num_workers=0, max_train_steps=4)
    assert start(config, 1, "step", 2, UNREAD) == [75]
    (name,) = (path.name for path in Path(config.output_dir).glob("checkpoint-*"))
    assert name in ("checkpoint-2", "checkpoint-3")  # tqdm does not write after each step
    assert not differences(finish(config), unkilled)


@pytest.mark.slow
def test_second_signal_ends_the_run_at_once(settings):
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0})
    assert start(config, 1, "step", 3, TWICE) == [-signal.SIGTERM]
    assert sorted(p.name for p in Path(config.output_dir).glob("*checkpoint*")) == ["checkpoint-2"]


@pytest.mark.slow
def test_max_train_hours_ends_the_run(whole):
    """Each start gets a step further; all of them together are the run in one."""
    unkilled, config = whole(dataloader_num_workers=0, max_train_steps=4)
    hasty = replace(config, resume_from_checkpoint="latest", max_train_hours=1e-9)
    assert [start(hasty)[0] for _ in range(4)] == [75, 75, 75, 0]
    assert not differences(Path(config.output_dir), unkilled)


@pytest.mark.slow
def test_processes_stop_after_the_same_step(whole):
    unkilled, config = whole(num_processes=2, dataloader_num_workers=0, max_train_steps=4)
    assert start(config, 2, "step", 3, signal.SIGTERM) == [75, 75]
    assert (Path(config.output_dir) / "checkpoint-3").is_dir()
    assert not differences(finish(config, 2), unkilled)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_step_without_finite_loss_is_skipped(settings, num_processes):
    """On every process, though one saw it; weights, optimizer and the other steps' loss know nothing of it."""
    changes = {"dataloader_num_workers": 0, "logging_steps": 1, "checkpointing_steps": 1, "ema_power": 1.0}
    config = TrainingConfig(**{**settings, **changes, "checkpoints_total_limit": None, "save_images_epochs": 9})
    assert start(config, num_processes, "forward", 5, 1) == [0] * num_processes
    folder = Path(config.output_dir)
    assert [line["bad_steps"] for line in trace(folder)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["loss"] is None for line in trace(folder)] == [False, False, True, *[False] * 5]
    assert not (folder / "checkpoint-3").exists()
    assert (folder / "checkpoint-4").exists()
    message = said(config)
    assert re.search(r"a step is skipped.*: step 3: row \d+ \(.*\d\d\.png\) at t = \d+, loss nan", message)
    assert all(p.isfinite().all() for p in load_file(folder / "unet/diffusion_pytorch_model.safetensors").values())


@pytest.mark.slow
def test_max_bad_steps_ends_the_run(settings):
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0, "max_bad_steps": 3})
    assert start(config, 1, "forward", 5, 100) == [1]
    folder, message = Path(config.output_dir), said(config)
    assert re.search(r"3 steps in a row .*began at step 3: row \d+.*t = \d+.*last checkpoint is checkpoint-2", message)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert verify(folder / "checkpoint-2") is None
    # Step 4 is due for a checkpoint, and so for a line, which counts what was skipped; it gets no checkpoint.
    assert [(line["step"], line["loss"] is None) for line in trace(folder)] == [(2, False), (3, True), (4, True)]


def test_fused_adamw_leaves_everything_as_it_is_with_found_inf():
    """What a skipped step relies on."""
    for found in (0.0, 1.0):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5, fused=True)
        before = []
        for _ in range(2):
            weight.grad = torch.ones(3)
            before = [t.clone() for t in (weight.detach(), *optimizer.state[weight].values())]
            if len(before) > 1:
                optimizer.found_inf = torch.tensor(found)
            optimizer.step()
        after = [weight.detach(), *optimizer.state[weight].values()]
        assert all(torch.equal(a, b) == bool(found) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_resume_refuses_a_checkpoint_of_another_optimizer(whole):
    _, config = whole(optimizer="adamw", max_train_steps=4)
    file = Path(config.output_dir) / "config.yaml"
    assert start(config, 1, "step", 3) == [-signal.SIGKILL]
    assert start(replace(config, optimizer="muon", resume_from_checkpoint="latest")) == [1]
    assert "optimizer was adamw in this run, got muon" in said(config)
    file.write_text(re.sub("optimizer: adamw\nlearning_rate: .*\n", "optimizer: muon\n", file.read_text()))
    assert start(replace(config, optimizer="muon", resume_from_checkpoint="latest")) == [1]
    assert "optimizer must be adamw, whose moments the checkpoint holds, got muon" in said(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "what"),
    [(WORKER, "was killed by SIGKILL"), (SUSPEND, r"is suspended \(SIGSTOP\)")],
    ids="ds",
)
def test_loader_worker_that_gives_nothing_ends_the_run_with_a_checkpoint(whole, action, what):
    """Waiting for a stopped one would have no end, nor would the end of the process, which waits for its workers."""
    unkilled, config = whole(dataloader_num_workers=1, max_train_steps=8, checkpointing_steps=8)
    assert start(config, 1, "step", 1, action) == [1]
    message = said(config)
    assert re.search(rf"error: process \d+, which loads data, {what}", message)
    step = int(re.search(r"The run ends after step (\d)", message)[1])
    assert (Path(config.output_dir) / f"checkpoint-{step}").is_dir()
    assert not differences(finish(config), unkilled)


def test_output_dir_takes_one_run_at_a_time(settings):
    config = TrainingConfig(**settings)
    Path(config.output_dir).mkdir()
    with lock(Path(config.output_dir)):
        assert start(config) == [1]
    assert not (Path(config.output_dir) / "config.yaml").exists()


@pytest.mark.slow
def test_killed_launcher_ends_the_run_after_a_checkpoint(settings, tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process of its parent's end")
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0, "max_train_steps": 10**6})
    save_config(config, tmp_path / "config.yaml")
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(ROOT / "train_accelerate.py"), "--config", str(tmp_path / "config.yaml")]
    os.mkfifo(tmp_path / "said.txt")
    launcher = python(command, tmp_path, None, tmp_path / "said.txt")  # the process that trains is a fresh one
    launcher.start()
    with open(tmp_path / "said.txt") as pipe:
        for line in pipe:  # the bar's lines end with the first thing that is said
            if "it/s" in line or "s/it" in line or "checkpoint" in line:
                break
        launcher.kill()
        rest = pipe.read()  # until the process that trains has closed it
    assert "the end of the launcher was noticed: the run ends after step" in rest
    step = int(re.search(r"resumes from step (\d+)", rest)[1])
    assert verify(Path(config.output_dir) / f"checkpoint-{step}") is None


@pytest.mark.slow
def test_skipped_last_step_is_saved(settings):
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0, "max_train_steps": 4})
    assert start(config, 1, "forward", 7, 1) == [0]
    assert trace(config.output_dir)[-1]["bad_steps"] == 1
    assert verify(Path(config.output_dir) / "checkpoint-4") is None


def test_bad_images_are_named_without_their_files(settings, tmp_path):
    """The cache has what training needs."""
    images = tmp_path / "images"
    shutil.copytree(settings["train_data_dir"], images)
    config = TrainingConfig(**{**settings, "train_data_dir": str(images), "dataloader_num_workers": 0})
    config = replace(config, max_bad_steps=1)
    with pytest.raises(RunError, match=r"They began at step 1: row \d+ at t = \d+, loss nan"):
        train_without_files(config, images)


def train_without_files(config, images):
    def spoil(module, _, output):
        if isinstance(module, UNet2DModel) and not output.sample.is_meta:  # as where a network is only tried
            shutil.rmtree(images, ignore_errors=True)
            output.sample = output.sample * math.nan

    handle = register_module_forward_hook(spoil)
    try:
        train(config)
    finally:
        handle.remove()


@pytest.mark.slow
def test_overflowing_loss_with_finite_gradients_is_skipped(settings):
    """On a network whose last layer alone would learn: its gradients do not depend on the loss."""
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0, "max_train_steps": 1, "use_ema": False})
    config = replace(config, ema_halflife_images=None, ema_snapshots=16)

    def overflow(module, _, output):
        if isinstance(module, UNet2DModel) and module.training and not output.sample.is_meta:
            output.sample = output.sample + 1e20

    handle = register_module_forward_hook(overflow)
    try:
        with pytest.raises(RunError, match="the last 1 of 1 steps had no finite loss"):
            train(config)
    finally:
        handle.remove()
    assert trace(config.output_dir)[-1]["bad_steps"] == 1


@pytest.mark.slow
def test_run_that_ends_in_skipped_steps_has_failed(settings):
    """Resumed with more steps, it learns; resumed as it is, it has failed again."""
    config = TrainingConfig(**{**settings, "dataloader_num_workers": 0, "max_train_steps": 4})
    assert start(config, 1, "forward", 5, 4) == [1]
    assert "the last 2 of 4 steps had no finite loss and gradients: the run has failed" in said(config)
    folder = Path(config.output_dir)
    assert not (folder / "run.json").exists()
    assert verify(folder / "checkpoint-4") is None
    resume = replace(config, resume_from_checkpoint="latest")
    assert start(resume) == [1]
    assert start(replace(resume, max_train_steps=5)) == [0]
    assert json.loads((folder / "run.json").read_text())["training"]["num_bad_steps"] == 2


@pytest.mark.slow
def test_resume_keeps_a_changed_batch_size(settings):
    changes = {"dataloader_num_workers": 0, "gradient_accumulation_steps": 1, "train_batch_size": 4}
    config = TrainingConfig(**{**settings, **changes, "max_train_steps": 3, "checkpointing_steps": 2})
    assert start(config, 1, "step", 3) == [-signal.SIGKILL]
    larger = replace(config, train_batch_size=5, resume_from_checkpoint="latest")
    assert start(larger, 1, "step", 1) == [-signal.SIGKILL]
    assert start(larger) == [0]
    assert "the global batch changes from 4 to 5 images" in said(config)
    # 2 steps of 4, then of 5, until 12 are seen; and finishing once more is no mistake.
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["training"]["images"] == 13
    assert start(larger) == [0]


@pytest.mark.slow
def test_train_works_in_a_thread(settings):
    config = TrainingConfig(**{**settings, "max_train_steps": 2, "save_images_epochs": None})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, config).result()


def test_dropout_differs_by_step_and_by_forward_pass():
    def mask(step, slot):
        seed_step(0, step, slot)
        return torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()

    assert mask(3, 1) == mask(3, 1)
    assert len({tuple(mask(step, slot)) for step in (0, 1) for slot in (0, 1)}) == 4
