"""A config from flags, YAML files and recipes, and back to YAML."""

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ddpm.cli import app
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.settings import check_effects, check_values, choices_of, settings_of
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import check_same_run, load_config, save_config
from tests.support.command_line import parse_config

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


def test_flags_of_train_unconditional_exist():
    assert set(STOCK_FLAGS.split()) <= {f.name for f in fields(TrainingConfig)}


def test_command_of_train_unconditional_parses(tmp_path):
    (tmp_path / "photos").mkdir()
    command = (
        "--train_data_dir photos --resolution 64 --center_crop --random_flip --output_dir ddpm-photos "
        "--train_batch_size 16 --num_epochs 100 --gradient_accumulation_steps 1 --use_ema --learning_rate 1e-4 "
        "--lr_warmup_steps 500 --mixed_precision no --save_images_epochs 10 --prediction_type epsilon"
    )
    config = parse_config(command.split())
    assert (config.resolution, config.learning_rate, config.use_ema, config.center_crop) == (64, 1e-4, True, True)


@pytest.mark.parametrize(
    ("arguments", "use_ema"),
    [
        (["--use_ema"], True),
        (["--no_use_ema"], False),
        (["--no-use-ema"], False),
        (["--use_ema", "False"], False),
        (["--use_ema", "true"], True),
        (["--use_ema=False"], False),
        (["--use-ema=TRUE"], True),
        (["--use_ema", "--random_flip"], True),
    ],
)
def test_bool_flag_takes_each_form(arguments, use_ema):
    assert parse_config([*arguments, "--max_train_steps", "3"]).use_ema is use_ema


@pytest.mark.parametrize(
    ("arguments", "compile"),
    [
        ([], False),
        (["--compile"], True),
        (["--no_compile"], False),
        (["--no-compile"], False),
        (["--no_compile=true"], False),
        (["--no_compile", "false"], True),
        (["--compile", "--random_flip"], True),
        (["--compile", "auto"], "auto"),
        (["--compile=auto"], "auto"),
        (["--compile", "False"], False),
        (["--compile=TRUE"], True),
    ],
)
def test_bool_flag_that_takes_a_word_takes_each_form(arguments, compile):
    assert parse_config([*arguments, "--max_train_steps", "3"]).compile is compile


def test_bool_flag_names_the_words_that_it_takes():
    with pytest.raises(UsageError, match="compile must be one of true, false, auto, got 'always'"):
        parse_config(["--compile", "always", "--max_train_steps", "3"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ema_halflife_images", "50", "500", "--seed", "1"],
        ["--ema_halflife_images", "50", "--ema-halflife-images=500", "--seed", "1"],
        ["--seed", "1", "--ema_halflife_images", "50", "500"],
    ],
)
def test_list_flag_takes_several_words(arguments):
    config = parse_config(arguments)
    assert (config.ema_halflife_images, config.seed) == ([50, 500], 1)


def test_no_data_means_recipe_digits():
    assert parse_config(["--max_train_steps", "20"]) == load_config(recipe="digits", max_train_steps=20)
    assert parse_config(["--dataset_name", "digits"]) == TrainingConfig(dataset_name="digits")


@pytest.mark.slow
def test_learning_rate_depends_on_optimizer(tmp_path):
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


def test_flag_overrides_file_and_file_overrides_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-4\ntrain_batch_size: 8\n")
    config = parse_config(["--recipe", "cifar10-ddpm", "--config", str(file), "--train_batch_size", "4"])
    assert (config.ddpm_beta_schedule, config.learning_rate, config.train_batch_size) == ("linear", 3e-4, 4)
    loaded = load_config(str(file), "cifar10-ddpm", train_batch_size=4)
    assert loaded == config


def test_flag_replaces_recipe_setting_of_another_name():
    assert parse_config(["--num_epochs", "3"]).max_train_steps is None
    assert parse_config(["--recipe", "fashion-mnist", "--train_data_dir", "photos"]).dataset_name is None


@pytest.mark.slow
def test_keyword_and_file_replace_recipe_setting_of_another_name(tmp_path):
    assert load_config(recipe="digits", num_epochs=3).max_train_steps is None
    assert load_config(recipe="fashion-mnist", train_data_dir="photos").dataset_name is None
    assert load_config(recipe="cifar10-ddpm", optimizer="muon").peak_learning_rate == 3e-3
    assert load_config(recipe="cifar10-ddpm", optimizer="muon", learning_rate=1e-3).learning_rate == 1e-3
    (tmp_path / "my.yaml").write_text("num_epochs: 3\n")
    assert load_config(str(tmp_path / "my.yaml"), "digits").max_train_steps is None
    assert load_config(str(tmp_path / "my.yaml"), "digits", max_train_steps=7).max_train_steps == 7
    assert parse_config(["--recipe", "digits", "--config", str(tmp_path / "my.yaml")]).max_train_steps is None


def test_resume_may_leave_out_warm_up_without_effect(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(TrainingConfig(lr_scheduler="constant", lr_warmup_steps=500), path)
    check_same_run(TrainingConfig(lr_scheduler="constant", lr_warmup_steps=0), path)
    save_config(TrainingConfig(lr_warmup_steps=500), path)
    with pytest.raises(UsageError, match="lr_warmup_steps was 500 in this run, got 0"):
        check_same_run(TrainingConfig(lr_warmup_steps=0), path)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML takes it for false
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # and this for a text
        ("checkpoints_total_limit: null", "checkpoints_total_limit", None),
        ("ema_halflife_images: 50", "ema_halflife_images", [50]),
        ("channels: 3", "channels", 3),
        ("center_crop: true", "center_crop", True),
    ],
)
def test_yaml_value_has_type_of_setting(line, name, value, tmp_path):
    (tmp_path / "my.yaml").write_text(f"{line}\n")
    assert getattr(load_config(str(tmp_path / "my.yaml")), name) == value
    assert getattr(parse_config(["--config", str(tmp_path / "my.yaml")]), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rates: 1", "unknown setting 'learning_rates'; did you mean learning_rate"),
        ("- a", "it must be a mapping, got \\['a'\\]: write a line"),
        ("a: [", "run.yaml cannot be read"),
        ("max_train_steps: many", "max_train_steps must be a whole number, got 'many'"),
        ("train_batch_size: 1.5", "train_batch_size must be a whole number or auto, got 1.5"),
        ("learning_rate: true", "learning_rate must be a number, got True"),
        ("use_ema: perhaps", "use_ema must be true or false, got 'perhaps'"),
        ("output_dir: [a, b]", "output_dir must be a text"),
        (f"learning_rate: 1{400 * '0'}", "learning_rate must be a number, got 1000"),
        ("ema_halflife_images: [1, x]", "ema_halflife_images must be a number or a list of numbers, got 'x'"),
    ],
)
def test_load_config_rejects_file(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(tmp_path / "run.yaml"))


def test_name_that_is_part_of_others_means_the_first_of_them():
    with pytest.raises(UsageError, match="unknown setting 'batch_size'; did you mean train_batch_size"):
        load_config(batch_size=4)


def test_init_from_rejects_flags_that_the_model_decides(tmp_path):
    with pytest.raises(UsageError, match="prediction_type is that of the model in init_from"):
        parse_config(["--init_from", "me/digits", "--prediction_type", "v_prediction"])  # the default's value, too
    (tmp_path / "config.yaml").write_text("init_from: me/digits\n")
    with pytest.raises(UsageError, match="prediction_type is that of the model in init_from"):
        parse_config(["--config", str(tmp_path / "config.yaml"), "--prediction_type", "v_prediction"])
    config = parse_config(
        ["--init_from", "me/digits", "--recipe", "cifar10-ddpm", "--output_dir", str(tmp_path / "run")]
    )
    assert (config.prediction_type, config.model_config_name_or_path) == ("epsilon", None)


def test_token_is_in_no_message():
    assert "hf_secret" not in repr(TrainingConfig(hub_token="hf_secret"))
    for arguments in (["--hub_token", "hf_secret"], ["--hub_token", "hf_secret", "--max_train_steps", "many"]):
        with pytest.raises(UsageError) as error:
            parse_config(arguments)
        assert "hf_secret" not in str(error.value)
    with pytest.raises(UsageError) as error:
        load_config(hub_token="hf_secret", max_train_steps="many")
    assert "hf_secret" not in str(error.value)


def test_token_in_a_file_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("push_to_hub: true\nhub_token: hf_secret\n")
    message = "hub_token must not stand in a file, .* use hf auth login, or HF_TOKEN"
    with pytest.raises(UsageError, match=message) as error:
        parse_config(["--config", str(tmp_path / "config.yaml")])
    assert "hf_secret" not in str(error.value)


@pytest.mark.parametrize("argument", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_token_leaves_the_command_line_before_anything_can_fail(argument, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-ddpm", "train", *argument, "--max_train_steps", "many"])
    with pytest.raises(SystemExit):
        app(prog_name="hf-ddpm")
    assert "max_train_steps" in capsys.readouterr().err
    assert sys.argv == ["hf-ddpm", "train", "--max_train_steps", "many"]


def test_saved_config_has_no_token_and_replays(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    config = load_config(recipe="cifar10-ddpm", push_to_hub=True, hub_token="hf_secret", max_train_steps=7)
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text
    assert "hub_token" not in text
    replayed = parse_config(["--config", str(tmp_path / "config.yaml")])
    assert asdict(replayed) == {**asdict(config), "hub_token": None}


def test_saved_config_names_folders_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "base", "digits"):
        (tmp_path / name).mkdir()
    save_config(TrainingConfig(train_data_dir="photos", init_from="base"), tmp_path / "a.yaml")
    save_config(TrainingConfig(dataset_name="digits", init_from="me/base"), tmp_path / "b.yaml")
    a, b = (load_config(str(tmp_path / name)) for name in ("a.yaml", "b.yaml"))
    assert (a.train_data_dir, a.init_from) == (str(tmp_path / "photos"), str(tmp_path / "base"))
    assert (b.dataset_name, b.init_from) == ("digits", "me/base")


def values_of(hint, info) -> st.SearchStrategy:
    """Return a strategy for the legal values of a setting, from its type and its range."""
    kinds = {hint, *get_args(hint)}
    # No path in it: a folder that exists is saved as an absolute path, and `~` at the start of one is expanded.
    strategy = st.text("abcABC019 _-:#'\"[]{}!&*%@`|>?,=~é√\n\t", min_size=1)
    if info.is_path:
        strategy = strategy.filter(lambda text: not text.startswith("~"))
    if choices := choices_of(hint):
        strategy = st.sampled_from(choices)
    elif info.names:
        strategy = st.lists(st.sampled_from(info.names), min_size=1, unique=True).map(",".join)
    elif list[int] in kinds and int in kinds:
        numbers = st.integers(int(info.at_least), 10**6)
        strategy = numbers | st.lists(numbers, min_size=info.num_values, max_size=info.num_values)
    elif info.num_values:
        numbers = st.integers(-1000 if info.at_least is None else int(info.at_least), 65535).map(float)
        strategy = st.lists(numbers, min_size=info.num_values, max_size=info.num_values, unique=True).map(sorted)
    elif list[int] in kinds:
        strategy = st.lists(st.integers(1, 1000), min_size=1, max_size=4, unique=True)
    elif list[float] in kinds:
        numbers = st.floats(info.at_least, 1e12, allow_nan=False)
        strategy = st.lists(numbers, min_size=1, max_size=4, unique_by=lambda number: f"{number:g}")
    elif bool in kinds:
        strategy = st.booleans()
    elif int in kinds:
        smallest = None if info.at_least is None else int(info.at_least)
        strategy = st.integers(smallest, (2**63 if info.below is None else info.below) - 1)
    elif float in kinds:
        smallest = info.above if info.at_least is None else info.at_least
        is_open = info.above is not None
        strategy = st.floats(
            *(smallest, info.below),
            allow_nan=False,
            allow_infinity=False,
            exclude_min=is_open,
            exclude_max=info.below is not None,
        )
    return st.none() | strategy if type(None) in kinds else strategy


@st.composite
def legal_configs(draw) -> TrainingConfig:
    hints = get_type_hints(TrainingConfig)
    infos = {name: info for name, _, info in settings_of(TrainingConfig) if info.resume != "start"}
    changed = draw(st.sets(st.sampled_from(sorted(infos))))
    config = TrainingConfig(**{name: draw(values_of(hints[name], infos[name])) for name in sorted(changed)})
    for _ in infos:  # a setting that another one leaves without effect gets its default
        try:
            check_effects(config)
        except UsageError as error:
            name = str(error).split()[0]
            config = replace(config, **{name: getattr(TrainingConfig, name)})
    return config


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved") / "config.yaml"


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(config=legal_configs())
def test_config_survives_yaml(saved_file, config):
    check_values(config)
    check_effects(config)
    save_config(config, saved_file)
    assert load_config(str(saved_file)) == replace(config, learning_rate=config.peak_learning_rate)
