"""`train_batch_size auto`: bytes that are computed, a batch that fits, images per step that stay."""

from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

from hf_ddpm import UsageError, load_config
from hf_ddpm.runtime.devices import _left_in_groups
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.automatic import check_batch, choose_batch, keep_batch
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.memory import LiveBytes, StepMemory, batch_that_fits, room_for_steps, step_memory
from hf_ddpm.training.parsing import config_from_flags, save_config
from tests.support.networks import smallest_unet_config

CPU, ALONE = torch.device("cpu"), Processes(timedelta(minutes=1))


@pytest.fixture(scope="module")
def unet():
    return UNet2DModel(**smallest_unet_config(channels=1, num_class_embeds=3))


def real_bytes(unet, dtype, num_images):
    """The bytes of the tensors of two forward and backward passes, of real numbers."""
    x_t, t = torch.zeros(num_images, 1, 8, 8), torch.zeros(num_images, dtype=torch.int64)
    unet.zero_grad()
    with LiveBytes([*unet.parameters(), x_t, t]) as held:
        for _ in range(2):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                output = unet(x_t, t, class_labels=t).sample
            output.float().square().mean().backward()
            del output
    return held.peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_bytes_of_a_step_are_those_of_real_passes(unet, dtype):
    """Of batches for which they were not computed, beside weights and moments: no less, and not much more."""
    memory = step_memory(unet, dtype, num_copies=0, num_processes=1)
    states = 3 * sum(p.nbytes for p in unet.parameters())
    for num_images in (2, 24, 64):
        assert real_bytes(unet, dtype, num_images) <= memory.of(num_images) - states
    assert memory.of(64) - states < 1.2 * real_bytes(unet, dtype, 64)
    assert all(p.device == CPU and type(p.data) is torch.Tensor for p in unet.parameters())
    more = step_memory(unet, dtype, num_copies=3, num_processes=2)
    assert more.fixed - memory.fixed == 4 * states // 3
    assert more.per_image == memory.per_image


@pytest.mark.slow
def test_gradient_checkpointing_lowers_the_bytes_of_an_image(unet):
    before = step_memory(unet, None, 0, 1)
    unet.enable_gradient_checkpointing()
    try:
        assert step_memory(unet, None, 0, 1).per_image < 0.8 * before.per_image
    finally:
        unet.disable_gradient_checkpointing()


def test_batch_that_fits_is_the_largest_divisor():
    memory = StepMemory(fixed=100, per_image=10)
    assert [batch_that_fits(12, memory, room) for room in (1000, 219, 160, 159, 110, 0)] == [12, 6, 6, 4, 1, 1]


@pytest.mark.slow
def test_chosen_batch_fits_and_keeps_the_images_of_a_step(unet):
    """Of more images than any memory holds; accumulation makes up for those that do not fit."""
    count = 3 * 2**30
    config = TrainingConfig(train_batch_size="auto", global_batch_size=count)
    chosen, line = choose_batch(config, unet, CPU, 1, ALONE)
    assert 1 < chosen.batch_size < count
    assert chosen.batch_size * chosen.gradient_accumulation_steps == count
    assert f"train_batch_size auto is {chosen.batch_size}, gradient_accumulation_steps" in line
    # The memory that is free changes meanwhile; the next divisor is at most half as large again.
    memory, room = step_memory(unet, None, 1, 1), room_for_steps(CPU, 1)
    assert memory.of(chosen.batch_size) < 1.2 * room
    assert memory.of(3 * chosen.batch_size // 2) > 0.8 * room


def test_network_that_looks_at_numbers_is_refused(unet):
    network = deepcopy(unet)
    forward = network.forward
    network.forward = lambda x_t, t, **labels: forward(x_t, t.clamp(max=int(t.max())), **labels)
    with pytest.raises(UsageError, match="train_batch_size must be a number for a network whose memory cannot be"):
        choose_batch(TrainingConfig(train_batch_size="auto"), network, CPU, 1, ALONE)


def test_images_that_processes_cannot_share_are_refused(tmp_path):
    config = TrainingConfig(train_batch_size="auto", global_batch_size=10, output_dir=str(tmp_path / "run"))
    check_batch(config, ALONE)
    with pytest.raises(UsageError, match="must be a multiple of 3, the processes, got 10"):
        check_batch(config, SimpleNamespace(size=3))


def test_memory_left_in_groups_counts_pages_that_linux_takes_back(tmp_path):
    group = tmp_path / "groups/job_1/step"
    group.mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/job_1/step\n")
    left = partial(_left_in_groups, tmp_path / "groups", tmp_path / "membership")
    assert [*left()] == []
    (group.parent / "memory.max").write_text("1000\n")
    (group.parent / "memory.current").write_text("900\n")
    (group.parent / "memory.stat").write_text("anon 100\ninactive_file 700\n")
    (group / "memory.max").write_text("max\n")
    assert [*left()] == [800]


@pytest.mark.parametrize(
    ("recipe", "file", "flags", "images"),
    [
        ("cifar10-ddpm", "", {}, 128),
        ("cifar10-ddpm", "", {"global_batch_size": "96"}, 96),
        ("digits", "train_batch_size: 16\ngradient_accumulation_steps: 3", {}, 48),
        (None, "train_batch_size: auto\nglobal_batch_size: 40", {}, 40),
        (None, "seed: 3", {}, 32),
    ],
)
def test_images_of_a_step_are_those_of_the_weaker_settings(tmp_path, recipe, file, flags, images):
    path = tmp_path / "settings.yaml"
    path.write_text(file)
    config = load_config(str(path) if file else None, recipe, train_batch_size="auto", **flags)
    assert (config.train_batch_size, config.global_batch_size) == ("auto", images)
    assert config.gradient_accumulation_steps == 1
    check_config(replace(config, output_dir=str(tmp_path / "run"), dataset_name="digits"))


def test_resumed_run_does_not_ask_for_the_images_of_its_file(tmp_path):
    """Which may be those of one of several processes."""
    (tmp_path / "checkpoint-1").mkdir()
    save_config(TrainingConfig(train_batch_size=4, output_dir=str(tmp_path)), tmp_path / "config.yaml")
    settings = {"train_batch_size": "auto", "resume_from_checkpoint": "latest"}
    assert load_config(str(tmp_path / "config.yaml"), **settings).global_batch_size is None
    assert load_config(str(tmp_path / "config.yaml"), **settings, global_batch_size=6).global_batch_size == 6
    assert load_config(str(tmp_path / "config.yaml"), train_batch_size="auto").global_batch_size == 4


@pytest.mark.parametrize("file", ["train_batch_size:", "gradient_accumulation_steps:"])
def test_empty_value_is_no_number_of_images(tmp_path, file):
    path = tmp_path / "settings.yaml"
    path.write_text(file)
    assert load_config(str(path), train_batch_size="auto").train_batch_size == "auto"


def test_number_replaces_auto_of_a_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("train_batch_size: auto\nglobal_batch_size: 40")
    config = config_from_flags({"train_batch_size": "8", "output_dir": str(tmp_path / "run")}, str(path))
    assert (config.train_batch_size, config.global_batch_size) == (8, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_batch_size": "many"}, "train_batch_size must be a whole number or auto, got 'many'"),
        ({"train_batch_size": "2.5"}, "train_batch_size must be a whole number or auto, got '2.5'"),
        ({"train_batch_size": "0"}, "train_batch_size must be at least 1, got 0"),
        ({"global_batch_size": "8"}, "global_batch_size = 8 has no effect: give train_batch_size auto"),
        (
            {"train_batch_size": "auto", "gradient_accumulation_steps": "2"},
            "gradient_accumulation_steps must be left out with train_batch_size auto",
        ),
        ({"train_batch_size": "auto", "streaming": "true"}, "train_batch_size must be a number with streaming"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        config_from_flags({**flags, "output_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_value_of_another_type_is_refused_in_python():
    for value in (True, 2.0, "8"):
        with pytest.raises(UsageError, match="train_batch_size must be a whole number or auto"):
            check_config(TrainingConfig(train_batch_size=value))


def test_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="train_batch_size must be a number with FSDP"):
        check_config(TrainingConfig(train_batch_size="auto", output_dir=str(tmp_path / "run")))


def test_resumed_run_keeps_its_batch(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    save_config(TrainingConfig(train_batch_size=6, gradient_accumulation_steps=5), tmp_path / "config.yaml")
    new = TrainingConfig(train_batch_size="auto", output_dir=str(tmp_path))
    assert keep_batch(new) == (new, None)
    kept, line = keep_batch(replace(new, resume_from_checkpoint="latest"))
    assert (kept.train_batch_size, kept.gradient_accumulation_steps) == (6, 5)
    assert line == "train_batch_size auto is 6: as in this run until now"


@pytest.mark.slow
def test_run_that_chose_is_the_run_that_was_told(tiny_settings, tmp_path):
    """To the last bit; and its folder says what it chose, to which a resumed run keeps."""
    told = TrainingConfig(**{**tiny_settings, "train_batch_size": 8, "output_dir": str(tmp_path / "told")})
    changes = {"train_batch_size": "auto", "global_batch_size": 8, "output_dir": str(tmp_path / "chose")}
    chose = TrainingConfig(**{**tiny_settings, **changes})
    for config in (told, chose):
        train(config)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "told" / weights).read_bytes() == (tmp_path / "chose" / weights).read_bytes()
    saved = load_config(str(tmp_path / "chose" / "config.yaml"))
    assert (saved.train_batch_size, saved.gradient_accumulation_steps, saved.global_batch_size) == (8, 1, None)
    resumed = replace(chose, resume_from_checkpoint="latest", max_train_steps=7)
    with pytest.raises(UsageError, match="global_batch_size was 8 in this run, got 4"):
        train(replace(resumed, global_batch_size=4))
    train(resumed)
    assert load_config(str(tmp_path / "chose" / "config.yaml")).train_batch_size == 8
