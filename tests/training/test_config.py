"""Settings: what each says about itself, what is refused, and that each of them is read."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from hf_ddpm import recipes
from hf_ddpm.network import make_unet
from hf_ddpm.network_config import sized_config
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.run_files import run_files
from hf_ddpm.runtime.settings import settings_of
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.model import make_scheduler
from hf_ddpm.training.parsing import load_config
from tests.support.command_line import parse_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_each_setting_is_read():
    read = set()
    for path in (ROOT / "hf_ddpm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # `scheduler.config` and `unet.config` are diffusers' own.
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                "config",
                "form.config",
                "run.config",
                "self",
            ):
                read.add(node.attr)
    assert {f.name for f in fields(TrainingConfig)} <= read


def test_each_setting_describes_itself():
    names = {each.name for each in fields(TrainingConfig)}
    groups = [info.group for _, _, info in settings_of(TrainingConfig)]
    for name, default, info in settings_of(TrainingConfig):
        assert info.resume in ("fixed", "free", "start"), name
        assert info.help[0].isalpha() or info.help[0] == "`", name
        assert info.help.endswith("."), name
        assert info.only_with.keys() <= names, name
        assert default is None or info.at_least is None or default >= info.at_least, name
    order = ["data", "model", "objective", "tuning", "optimization", "averages", "output", "sharing", "machine"]
    assert list(dict.fromkeys(groups)) == order
    assert groups == sorted(groups, key=order.index)  # each group is in one piece


@pytest.mark.parametrize("name", ["max_grad_norm", "train_batch_size", "seed", "ema_max_decay", "num_epochs"])
def test_check_config_rejects_setting_without_value(name, tmp_path):
    (tmp_path / "my.yaml").write_text(f"{name}: null\n")
    with pytest.raises(UsageError, match=f"{name} must have a value, got None"):
        check_config(load_config(str(tmp_path / "my.yaml")))


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_is_legal(name):
    check_config(load_config(recipe=name))


@pytest.mark.slow
def test_cifar10_recipe_is_that_of_ho_et_al():
    config = load_config(recipe="cifar10-ddpm")
    unet = make_unet(3, (32, 32), model_config=config.model_config_name_or_path)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 35.7
    assert {m.p for m in unet.modules() if isinstance(m, torch.nn.Dropout)} == {0.1, 0.0}
    scheduler = make_scheduler(config)
    assert (scheduler.config.prediction_type, scheduler.config.variance_type) == ("epsilon", "fixed_large")
    assert (scheduler.beta[0].item(), scheduler.beta[-1].item()) == (pytest.approx(1e-4), pytest.approx(0.02))


@pytest.mark.parametrize("resolution", [4, 8, 16, 28, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_network_is_sized_for_the_data(resolution, channels):
    settings = sized_config((resolution, resolution), channels, 2 * channels)
    with torch.device("meta"):
        unet = UNet2DModel.from_config(settings)
    lowest = resolution >> (len(settings["block_out_channels"]) - 1)
    assert resolution // 2 <= lowest <= 8 if resolution <= 8 else 4 <= lowest <= 8
    heads = {m.heads: m.to_q.out_features for m in unet.modules() if hasattr(m, "heads")}
    assert heads
    assert all(width / count == min(64, settings["block_out_channels"][-1]) for count, width in heads.items())
    norms = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms
    # A group of one channel would hide that channel's mean from all that follows.
    assert all(m.num_channels // m.num_groups >= 4 for m in norms)
    assert unet.conv_out.out_channels == 2 * channels


def test_first_prediction_is_zero():
    unet = make_unet(1, (8, 8))
    assert unet(torch.randn(2, 1, 8, 8), 3).sample.abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe nothing", "recipe must be one of cifar10-ddpm, digits, fashion-mnist, got 'nothing'"),
        ("--config nothing.yaml", "config must be a YAML file, got 'nothing.yaml'"),
        ("--learning_rat 1", "no such option: --learning_rat; did you mean --learning_rate"),
        ("--train_batch_size 0", "train_batch_size must be at least 1, got 0"),
        (f"--train_batch_size 1{400 * '0'}", "train_batch_size must fit in 64 bits, got 1000"),
        ("--train_batch_size many", "train_batch_size must be a whole number or auto, got 'many'"),
        ("--prediction_type x0", "prediction_type must be one of epsilon, sample, v_prediction, .*, got 'x0'"),
        ("--prediction_type epsilon --rescale_betas_zero_snr", "rescale_betas_zero_snr .*got epsilon"),
        ("--resume_from_checkpoint checkpoint-5", "resume_from_checkpoint must be latest or hub, got 'checkpoint-5'"),
        ("--ema_halflife_images 100 100", "ema_halflife_images must be different numbers of at least 1"),
        ("--ema_halflife_images 0.5", "ema_halflife_images must be different numbers of at least 1"),
        ("--ema_rampup_ratio 0.05 --ema_power 1", "ema_power = 1.0 has no effect: ema_rampup_ratio is given"),
        ("--max_train_hours 0", "max_train_hours must be above 0"),
        ("--shuffle_buffer_images 10", "shuffle_buffer_images = 10 has no effect: give streaming"),
        (
            "--streaming --max_train_steps 9 --stable_target_images 8",
            "stable_target_images = 8 has no effect: leave streaming out",
        ),
        ("--stable_target_images -1", "stable_target_images must not be negative, got -1"),
        ("--dropout 1.0", r"dropout must be in \[0, 1\), got 1.0"),
        ("--learning_rate -1", "learning_rate must be above 0, got -1.0"),
        ("--seed 99999999999999999999", r"seed must be in \[0, 2\*\*63\), got 9"),
        ("--learning_rate nan", "learning_rate must be above 0, got nan"),
        ("--seed -1", r"seed must be in \[0, 2\*\*63\), got -1"),
        ("--noise_level_mean inf", "noise_level_mean must be a finite number, got inf"),
        ("--use_ema=maybe", "--use_ema must be true or false, got 'maybe'"),
        ("--ddpm_beta_schedule linear --ddpm_beta_start 0.1", "must rise within .*got 0.1 and 0.02"),
        (
            "--timestep_density uniform --noise_level_std 2",
            "noise_level_std = 2.0 has no effect: give timestep_density",
        ),
        (
            "--lr_scheduler constant --lr_warmup_steps 500",
            "lr_warmup_steps = 500 has no effect: give lr_scheduler constant_with_warmup, linear, cosine",
        ),
        ("--min_snr_gamma 3", "min_snr_gamma = 3.0 has no effect: give loss_weighting min_snr"),
        ("--ddpm_beta_end 0.1", "ddpm_beta_end = 0.1 has no effect"),
        ("--no_use_ema --ema_max_decay 0.9", "ema_max_decay = 0.9 has no effect: give use_ema"),
        ("--ema_halflife_images 1000 --ema_max_decay 0.9", "has no effect: ema_halflife_images is given"),
        ("--hub_model_id me/mine", "hub_model_id = me/mine has no effect: give push_to_hub"),
        ("--no_hub_private_repo", "hub_private_repo = False has no effect: give push_to_hub"),
        ("--ddpm_num_inference_steps 2000", r"ddpm_num_inference_steps must be in \[1, 1000\], got 2000"),
        ("--local_rank 3", "local_rank must be the launcher's LOCAL_RANK, 0, got 3"),
        ("--push_to_hub", "push_to_hub needs a login: hf auth login"),
        ("--logger wandb", "wandb is not installed: pip install wandb"),
        ("--logger tensorboard,mlflow", "logger must be one of tensorboard, .* got 'tensorboard,mlflow'"),
        ("--logger wandb,wandb", "logger must be one of .* got 'wandb,wandb'"),
        ("--tracker_project mine", "tracker_project = mine has no effect: give logger wandb or trackio"),
        ("--enable_xformers_memory_efficient_attention", "xformers is not installed: pip install xformers"),
    ],
)
def test_flags_that_cannot_work_are_rejected(arguments, message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=message):
        parse_config(arguments.split())


def test_check_config_rejects_value_set_in_python():
    with pytest.raises(UsageError, match=r"lr_scheduler must be one of linear, .*got 'steps'"):
        check_config(TrainingConfig(lr_scheduler="steps"))  # pyright: ignore[reportArgumentType]


def test_check_config_rejects_output_dir_of_another_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    config = TrainingConfig(output_dir=str(tmp_path / "run"))
    check_config(config)
    (tmp_path / "run" / "README.md").write_text("mine too")
    check_config(config)
    assert run_files(tmp_path / "run") == []
    (tmp_path / "run" / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a run: choose another, --resume_from_checkpoint latest"):
        check_config(config)
    check_config(load_config(output_dir=config.output_dir, overwrite_output_dir=True))
    (tmp_path / "run" / "checkpoint-5").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UsageError, match="must be latest or hub or checkpoint-5, got 'checkpoint-6'"):
        check_config(load_config(output_dir=config.output_dir, resume_from_checkpoint="checkpoint-6"))
    with pytest.raises(UsageError, match="would delete the checkpoint"):
        check_config(
            load_config(output_dir=config.output_dir, resume_from_checkpoint="latest", overwrite_output_dir=True)
        )


@pytest.mark.parametrize(
    ("settings", "channels", "resolution", "num_classes", "message"),
    [
        ({}, 1, 30, None, "resolution must be a multiple of 4, got 30: .* the nearest is 28 or 32"),
        (
            {"model_config": "cifar10-ddpm"},
            1,
            32,
            None,
            "in_channels of .* must be 1, .*--channels; got 3",
        ),
        (
            {"model_config": "cifar10-ddpm"},
            3,
            64,
            None,
            "sample_size of .* must be 64, .*--resolution; got 32",
        ),
        (
            {"model_config": "cifar10-ddpm", "variance_type": "learned_range"},
            *(3, 32, None, "out_channels of the model config must be 6, for variance_type learned_range; got 3"),
        ),
        ({"model_config": "three_classes.json"}, 3, 32, 4, "num_class_embeds of .* must be 4, .*; got 3"),
        ({"model_config": "list.json"}, 3, 32, None, "it must be a mapping, got "),
        ({"model_config": "typo.json"}, 3, 32, None, "does not know: dropuot"),
        (
            {"model_config": "groups.json"},
            3,
            32,
            None,
            "that an image can pass, got ValueError: num_channels",
        ),
        ({"model_config": "./nothing"}, 3, 32, None, "must be a JSON file, .*got './nothing'"),
    ],
)
def test_make_unet_rejects_config_that_does_not_fit(settings, channels, resolution, num_classes, message, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "typo.json").write_text('{"sample_size": 32, "dropuot": 0.1}')
    (tmp_path / "three_classes.json").write_text('{"sample_size": 32, "num_class_embeds": 3}')
    (tmp_path / "groups.json").write_text('{"sample_size": 32, "norm_num_groups": 31}')
    with pytest.raises(UsageError, match=message):
        make_unet(channels, (resolution, resolution), num_classes, **settings)
