"""What is refused before an image is decoded and before the output folder is touched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.network import try_network
from hf_ddpm.runtime.devices import memory_of
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.trial import require_memory
from tests.support.networks import tiny_unet_config

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_settings, tmp_path) -> TrainingConfig:
    """A run whose images no cache holds yet."""
    return TrainingConfig(**{**tiny_settings, "cache_dir": str(tmp_path / "cache"), "max_train_steps": 1})


def refused(config: TrainingConfig) -> str:
    """What a run is refused with; nothing was decoded, and the folder is as it was."""
    with pytest.raises(UsageError) as error:
        train(config)
    assert not Path(config.output_dir).exists()
    assert not list(Path(config.cache_dir or "").glob("hf_ddpm/*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": 64}, "block_out_channels of the model config must be a list of whole numbers, got 64"),
        ({"block_out_channels": []}, "block_out_channels of the model config must be a list"),
        ({"sample_size": []}, "sample_size of the model config must be a whole number above 0"),
        ({"sample_size": "8"}, "a height and a width, got '8'"),
        (
            {"time_embedding_type": "sine"},
            "time_embedding_type of the model config must be one of positional, fourier, learned, got 'sine'",
        ),
        ({"in_channels": "1"}, "out_channels of the model config must be"),
        ({"downsample_padding": 3}, "must make a UNet2DModel that an image can pass, got RuntimeError"),
        ({"norm_num_groups": 3}, "must make a UNet2DModel that an image can pass, got ValueError"),
        ({"act_fn": "relo"}, "must make a UNet2DModel that an image can pass, got ValueError"),
        ({"heads": 3}, "the model config has settings that UNet2DModel does not know: heads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_model_config_that_makes_no_network_is_refused_in_a_line(changes, message, tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps(tiny_unet_config(channels=1, **changes)))
    with pytest.raises(UsageError) as error:
        try_network(model_config=str(tmp_path / "unet.json"))
    assert message in str(error.value)


def test_corrected_model_config_is_taken(config, tmp_path):
    file = tmp_path / "unet.json"
    right = file.read_text()
    file.write_text(json.dumps(tiny_unet_config(channels=1, downsample_padding=3)))
    assert "that an image can pass" in refused(config)
    file.write_text("[" + right)
    assert "unet.json cannot be read" in refused(config)
    file.write_text(right)
    assert train(config) is not None


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 30, "model_config_name_or_path": None}, "resolution must be a multiple of 4, got 30"),
        ({"resolution": 2**20, "model_config_name_or_path": None}, "largest layer for train_batch_size 4 of 1048576"),
        ({"train_batch_size": 2**40}, "the largest layer for train_batch_size 1099511627776 of 8 x 8 pixels"),
        ({"gradient_accumulation_steps": 2**50}, "the images of gradient_accumulation_steps"),
        ({"eval_batch_size": 2**50}, "a preview of eval_batch_size"),
        ({"ddpm_num_steps": 2**50}, "the tables of ddpm_num_steps"),
        ({"cpu_threads_per_process": 2**31}, "cpu_threads_per_process must be at most"),
        ({"model_config_name_or_path": "nobody/offline"}, "model_config_name_or_path must be a JSON file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_machine_can_hold_is_refused_before_images_are_decoded(config, settings, message):
    assert message in refused(replace(config, **settings))


def test_images_decide_the_size_before_they_are_decoded(config, tmp_path, image_folder):
    (tmp_path / "odd").mkdir()
    Image.new("L", (30, 30)).save(tmp_path / "odd" / "a.png")
    settings = {"train_data_dir": str(tmp_path / "odd"), "model_config_name_or_path": None}
    assert "resolution must be a multiple of 4, got 30" in refused(replace(config, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_split": "test"}, "eval_split must be in train_data_dir as a folder, got 'test'"),
        ({"eval_split": "../x"}, "eval_split must be a name such as train or test, got '../x'"),
        ({"eval_split": "validation", "eval_network_path": "nothing"}, "network_path must be the weights file"),
    ],
)
def test_what_a_validation_needs_is_looked_for_first(config, tmp_path, image_folder, settings, message):
    for split in ("train", "validation"):
        shutil.copytree(image_folder, tmp_path / "data" / split)
    data = {"train_data_dir": str(tmp_path / "data"), "eval_steps": 1}
    assert message in refused(replace(config, **data, **settings))


def test_memory_that_suffices_is_not_refused(config):
    trial = try_network(model_config=config.model_config_name_or_path, size=(8, 8))
    require_memory(config, trial, CPU)
    assert (trial.channels, trial.size) == (1, (8, 8))


def test_memory_must_hold_the_teacher_too(config):
    """A network whose weights fit four times is trained, and cannot be tuned."""
    trial = try_network(model_config=config.model_config_name_or_path, size=(8, 8))
    trial = replace(trial, num_parameters=int(memory_of(CPU) / 4 / 4.5))
    require_memory(config, trial, CPU)
    with pytest.raises(UsageError, match="a step must fit in the memory of this machine"):
        require_memory(replace(config, init_from="a-model", tuned_steps=[1]), trial, CPU)


@pytest.fixture
def base(make_unet, tmp_path) -> Path:
    """A model of 8 x 8 gray images."""
    scheduler = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1), scheduler).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def without_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop("conv_out.weight")
    save_file(tensors, file, {"format": "pt"})


def with_another_shape(file: Path) -> None:
    save_file({**load_file(file), "conv_out.weight": torch.zeros(2, 3)}, file, {"format": "pt"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", [cut, empty, without_a_tensor, with_another_shape, Path.unlink])
def test_damaged_weights_are_refused_in_a_line(config, base, damage):
    damage(base / "unet" / "diffusion_pytorch_model.safetensors")
    settings = {"init_from": str(base), "model_config_name_or_path": None, "ddpm_num_steps": 1000}
    assert f"init_from {str(base)!r} must hold a whole model, got" in refused(replace(config, **settings))
    with pytest.raises(UsageError, match=r"model '.*base' must hold a whole model, got"):
        load_for_sampling(str(base))


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_damaged_configs_are_refused_in_a_line(config, base, file):
    for content in ("{", "[]", '{"sample_size": [], "unet": [], "beta_schedule": 3}'):
        (base / file).write_text(content)
        settings = {"init_from": str(base), "model_config_name_or_path": None, "ddpm_num_steps": 1000}
        refused(replace(config, **settings))
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            load_for_sampling(str(base))


def test_compiler_is_looked_for_first(config, tmp_path, base, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "compile needs a compiler of C++, got none called 'g++'" in refused(replace(config, compile=True))
    with pytest.raises(UsageError, match=r"compile needs a compiler of C\+\+"):
        load_for_sampling(str(base), compile=True)


def test_setting_at_odds_with_a_resumed_run_is_named_before_decoding(config):
    train(config)
    shutil.rmtree(Path(config.cache_dir or ""))
    with pytest.raises(UsageError, match=r"learning_rate was 0\.003 in this run, got 0\.1"):
        train(replace(config, resume_from_checkpoint="latest", learning_rate=0.1))
    assert not Path(config.cache_dir or "").exists()


def test_full_memory_ends_the_run_in_a_line_with_the_remedy(config):
    def take_all(*_, **__):
        return torch.empty(2**50)

    message = r"^the memory is full: [^\n]*allocate[^\n]*smaller --train_batch_size[^\n]*--gradient_accumulation_steps"
    for asked in (config, replace(config, dry_run=True)):
        with pytest.raises(RunError, match=message):
            train(asked, objective=take_all)
