"""Settings: where they come from, what is refused, and that each of them is read."""

import ast
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel

from hf_ddpm import recipes
from hf_ddpm.network import make_unet, sized_config
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.launch import hide
from hf_ddpm.runtime.run_files import run_files
from hf_ddpm.training.checks import check_config
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import check_same_run, load_config, parse_config, save_config
from hf_ddpm.training.setup import make_scheduler

ROOT = Path(__file__).parents[2]
# The flags of diffusers' train_unconditional.py.
STOCK_FLAGS = (
    "dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir "
    "cache_dir resolution center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs "
    "save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps "
    "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub "
    "hub_token hub_model_id hub_private_repo logger logging_dir local_rank mixed_precision prediction_type "
    "ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint enable_xformers_memory_efficient_attention preserve_input_precision"
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_field_is_read():
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


def test_each_flag_of_train_unconditional_is_there():
    assert set(STOCK_FLAGS.split()) <= {f.name for f in fields(TrainingConfig)}


def test_a_command_of_train_unconditional_runs_with_one_word_changed(tmp_path):
    (tmp_path / "photos").mkdir()
    command = (
        "--train_data_dir photos --resolution 64 --center_crop --random_flip --output_dir ddpm-photos "
        "--train_batch_size 16 --num_epochs 100 --gradient_accumulation_steps 1 --use_ema --learning_rate 1e-4 "
        "--lr_warmup_steps 500 --mixed_precision no --save_images_epochs 10 --prediction_type epsilon"
    )
    config = parse_config(command.split())
    assert (config.resolution, config.learning_rate, config.use_ema, config.center_crop) == (64, 1e-4, True, True)


def test_no_data_means_the_recipe_digits():
    assert parse_config(["--max_train_steps", "20"]) == load_config(recipe="digits", max_train_steps=20)
    assert parse_config(["--dataset_name", "digits"]) == TrainingConfig(dataset_name="digits")


def test_the_learning_rate_goes_with_the_optimizer(tmp_path):
    assert TrainingConfig().peak_learning_rate == parse_config(["--dataset_name", "digits"]).peak_learning_rate == 3e-3
    assert parse_config(["--dataset_name", "digits", "--optimizer", "adamw"]).peak_learning_rate == 1e-3
    assert parse_config(["--optimizer", "adamw", "--learning_rate", "0.1"]).learning_rate == 0.1
    file = tmp_path / "config.yaml"
    save_config(TrainingConfig(optimizer="adamw"), file)
    assert "learning_rate: 0.001" in file.read_text()
    # Another optimizer than the file's does not get the rate that the file has for it; the same one does.
    file.write_text("optimizer: adamw\nlearning_rate: 0.5\n")
    rates = [
        parse_config(["--config", str(file), "--optimizer", name]).peak_learning_rate for name in ("muon", "adamw")
    ]
    assert rates == [3e-3, 0.5]


def test_flags_go_before_the_file_and_the_file_before_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-4\ntrain_batch_size: 8\n")
    config = parse_config(["--recipe", "cifar10-ddpm", "--config", str(file), "--train_batch_size", "4"])
    assert (config.ddpm_beta_schedule, config.learning_rate, config.train_batch_size) == ("linear", 3e-4, 4)
    loaded = load_config(str(file), "cifar10-ddpm", train_batch_size=4)
    assert loaded == config


def test_a_flag_replaces_what_a_recipe_says_by_another_name():
    assert parse_config(["--num_epochs", "3"]).max_train_steps is None
    assert parse_config(["--recipe", "fashion-mnist", "--train_data_dir", "photos"]).dataset_name is None


def test_a_keyword_and_a_file_replace_what_a_recipe_says_by_another_name(tmp_path):
    assert load_config(recipe="digits", num_epochs=3).max_train_steps is None
    assert load_config(recipe="fashion-mnist", train_data_dir="photos").dataset_name is None
    assert load_config(recipe="cifar10-ddpm", optimizer="muon").peak_learning_rate == 3e-3
    assert load_config(recipe="cifar10-ddpm", optimizer="muon", learning_rate=1e-3).learning_rate == 1e-3
    (tmp_path / "my.yaml").write_text("num_epochs: 3\n")
    assert load_config(str(tmp_path / "my.yaml"), "digits").max_train_steps is None
    assert load_config(str(tmp_path / "my.yaml"), "digits", max_train_steps=7).max_train_steps == 7
    assert parse_config(["--recipe", "digits", "--config", str(tmp_path / "my.yaml")]).max_train_steps is None


def test_a_warm_up_that_had_no_effect_may_be_left_out(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(TrainingConfig(lr_scheduler="constant", lr_warmup_steps=500), path)
    check_same_run(TrainingConfig(lr_scheduler="constant", lr_warmup_steps=0), path)
    save_config(TrainingConfig(lr_warmup_steps=500), path)
    with pytest.raises(UsageError, match="lr_warmup_steps was 500 in this run, got 0"):
        check_same_run(TrainingConfig(lr_warmup_steps=0), path)


def test_a_bare_no_of_yaml_is_the_word(tmp_path):
    (tmp_path / "my.yaml").write_text("mixed_precision: no\n")
    assert load_config(str(tmp_path / "my.yaml")).mixed_precision == "no"


@pytest.mark.parametrize("name", ["max_grad_norm", "train_batch_size", "seed", "ema_max_decay", "num_epochs"])
def test_a_setting_without_a_value_is_refused(name, tmp_path):
    (tmp_path / "my.yaml").write_text(f"{name}: null\n")
    with pytest.raises(UsageError, match=f"{name} must have a value, got None"):
        check_config(load_config(str(tmp_path / "my.yaml")))


def test_nothing_can_be_said_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("checkpoints_total_limit: null\n")
    assert load_config(str(tmp_path / "run.yaml")).checkpoints_total_limit is None
    assert parse_config(["--config", str(tmp_path / "run.yaml")]).checkpoints_total_limit is None


def test_a_token_is_not_shown():
    assert "hf_secret" not in repr(TrainingConfig(hub_token="hf_secret"))


def test_the_written_config_replays(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    config = load_config(recipe="cifar10-ddpm", push_to_hub=True, hub_token="hf_secret", max_train_steps=7)
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text
    assert "hub_token" not in text
    replayed = parse_config(["--config", str(tmp_path / "config.yaml")])
    assert asdict(replayed) == {**asdict(config), "hub_token": None}


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_checked_configs(name):
    check_config(load_config(recipe=name))


def test_cifar10_recipe_is_ho_et_al():
    config = load_config(recipe="cifar10-ddpm")
    unet = make_unet(3, 32, model_config=config.model_config_name_or_path)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 35.7
    assert {m.p for m in unet.modules() if isinstance(m, torch.nn.Dropout)} == {0.1, 0.0}
    scheduler = make_scheduler(config)
    assert (scheduler.config.prediction_type, scheduler.config.variance_type) == ("epsilon", "fixed_large")
    assert (scheduler.beta[0].item(), scheduler.beta[-1].item()) == (pytest.approx(1e-4), pytest.approx(0.02))


@pytest.mark.parametrize("resolution", [8, 16, 28, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_is_sized_for_the_data(resolution, channels):
    settings = sized_config(resolution, channels, 2 * channels)
    with torch.device("meta"):
        unet = UNet2DModel.from_config(settings)
    lowest = resolution >> (len(settings["block_out_channels"]) - 1)
    assert 4 <= lowest <= 8
    heads = {m.heads: m.to_q.out_features for m in unet.modules() if hasattr(m, "heads")}
    assert all(width // count == 64 for count, width in heads.items())
    norms = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms
    # A group of one channel would hide that channel's mean from all that follows.
    assert all(m.num_channels // m.num_groups >= 4 for m in norms)
    assert unet.conv_out.out_channels == 2 * channels


def test_the_first_prediction_is_zero():
    unet = make_unet(1, 8)
    assert unet(torch.randn(2, 1, 8, 8), 3).sample.abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe nothing", "recipe must be one of cifar10-ddpm, digits, fashion-mnist, got 'nothing'"),
        ("--config nothing.yaml", "config must be a YAML file, got 'nothing.yaml'"),
        ("--learning_rat 1", "unrecognized arguments|ambiguous"),
        ("--train_batch_size 0", "train_batch_size must be at least 1, got 0"),
        ("--train_batch_size many", "invalid int value: 'many'"),
        ("--prediction_type x0", "invalid choice: 'x0'"),
        ("--prediction_type epsilon --rescale_betas_zero_snr", "rescale_betas_zero_snr .*got epsilon"),
        ("--resume_from_checkpoint checkpoint-5", "resume_from_checkpoint must be latest, got 'checkpoint-5'"),
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
        ("--seed 99999999999999999999", r"seed must be below 2\*\*63"),
        ("--learning_rate nan", "learning_rate must be above 0, got nan"),
        ("--seed -1", "seed must not be negative, got -1"),
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
        ("--ddpm_num_inference_steps 2000", r"ddpm_num_inference_steps must be in \[1, 1000\], got 2000"),
        ("--local_rank 3", "local_rank must be the launcher's LOCAL_RANK, 0, got 3"),
        ("--push_to_hub", "push_to_hub needs a login: hf auth login"),
        ("--logger wandb", "wandb is not installed: pip install wandb"),
        ("--enable_xformers_memory_efficient_attention", "xformers is not installed: pip install xformers"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        parse_config(arguments.split())
    assert exit.value.code == 2
    assert __import__("re").search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rates: 1", "unknown setting 'learning_rates'; did you mean 'learning_rate'"),
        ("- a", "must hold `name: value` lines, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(tmp_path / "run.yaml"))


def test_values_set_in_python_are_checked_too():
    with pytest.raises(UsageError, match=r"lr_scheduler must be one of linear, .*got 'steps'"):
        check_config(TrainingConfig(lr_scheduler="steps"))  # pyright: ignore[reportArgumentType]


def test_an_output_folder_with_another_run_is_refused(tmp_path):
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
    with pytest.raises(UsageError, match="must be latest or checkpoint-5, got 'checkpoint-6'"):
        check_config(load_config(output_dir=config.output_dir, resume_from_checkpoint="checkpoint-6"))
    with pytest.raises(UsageError, match="would delete the checkpoint"):
        check_config(
            load_config(output_dir=config.output_dir, resume_from_checkpoint="latest", overwrite_output_dir=True)
        )


@pytest.mark.parametrize(
    ("settings", "channels", "resolution", "num_classes", "message"),
    [
        ({}, 1, 30, None, "resolution must be a multiple of 4, got 30: .* the nearest is 28 or 32"),
        ({"model_config": "cifar10-ddpm"}, 1, 32, None, "in_channels must be 1, .*--channels; got 3"),
        ({"model_config": "cifar10-ddpm"}, 3, 64, None, "sample_size must be 64, .*--resolution; got 32"),
        (
            {"model_config": "cifar10-ddpm", "variance_type": "learned_range"},
            *(3, 32, None, "out_channels must be 6, for variance_type learned_range; got 3"),
        ),
        ({"model_config": "cifar10-ddpm"}, 3, 32, 10, "num_class_embeds must be 10, .*; got None"),
        ({"model_config": "list.json"}, 3, 32, None, "must hold a JSON object, got list"),
        ({"model_config": "typo.json"}, 3, 32, None, "does not know: dropuot"),
        ({"model_config": "groups.json"}, 3, 32, None, "makes no UNet2DModel: num_channels"),
        ({"model_config": "./nothing"}, 3, 32, None, "must be a JSON file, .*got './nothing'"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(settings, channels, resolution, num_classes, message, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "typo.json").write_text('{"sample_size": 32, "dropuot": 0.1}')
    (tmp_path / "groups.json").write_text('{"sample_size": 32, "norm_num_groups": 31}')
    with pytest.raises(UsageError, match=message):
        make_unet(channels, resolution, num_classes, **settings)


def test_a_wrong_flag_is_answered_before_torch_is_imported():
    code = """
import sys
from hf_ddpm.training.parsing import parse_config
try:
    parse_config(["--train_batch_size", "0"])
except SystemExit:
    assert "torch" not in sys.modules
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_names_each_setting(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in fields(TrainingConfig))
    assert yaml.safe_load("1e-4") == "1e-4"  # why values of YAML files are as_our_scheduler as flags are


def test_a_token_is_in_no_message(capsys):
    for arguments in (["--hub_token", "hf_secret"], ["--hub_token", "hf_secret", "--max_train_steps", "many"]):
        with pytest.raises(SystemExit):
            parse_config(arguments)
        assert "hf_secret" not in capsys.readouterr().err
    with pytest.raises(UsageError) as error:
        load_config(hub_token="hf_secret", max_train_steps="many")
    assert "hf_secret" not in str(error.value)


def test_a_token_is_taken_out_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token=hf_secret", "--hub_token", "hf_secret"])
    hide("hf_secret")
    assert sys.argv == ["train.py", "--hub_token=...", "--hub_token", "..."]


def test_what_a_model_decides_is_not_given_beside_it(capsys, tmp_path):
    with pytest.raises(SystemExit):  # the default's own value, too
        parse_config(["--init_from", "me/digits", "--prediction_type", "v_prediction"])
    assert "prediction_type is that of the model in init_from" in capsys.readouterr().err
    config = parse_config(
        ["--init_from", "me/digits", "--recipe", "cifar10-ddpm", "--output_dir", str(tmp_path / "run")]
    )
    assert (config.prediction_type, config.model_config_name_or_path) == ("epsilon", None)


def test_a_private_repository_is_nothing_to_ask_for(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("hub_private_repo: false\n")
    assert not parse_config(["--config", str(path), "--output_dir", str(tmp_path / "run")]).hub_private_repo


def test_a_folder_is_written_down_so_that_it_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "base", "digits"):
        (tmp_path / name).mkdir()
    save_config(TrainingConfig(train_data_dir="photos", init_from="base"), tmp_path / "a.yaml")
    save_config(TrainingConfig(dataset_name="digits", init_from="me/base"), tmp_path / "b.yaml")
    a, b = (load_config(str(tmp_path / name)) for name in ("a.yaml", "b.yaml"))
    assert (a.train_data_dir, a.init_from) == (str(tmp_path / "photos"), str(tmp_path / "base"))
    assert (b.dataset_name, b.init_from) == ("digits", "me/base")
