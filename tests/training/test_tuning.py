"""The tuning of a trained model for few steps: its settings, its teacher, resume, and what it leaves."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler, UsageError
from hf_ddpm.classes import Classes
from hf_ddpm.cli import app
from hf_ddpm.guidance import Guidance
from hf_ddpm.label_embedding import save_network
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.files import read_metrics
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.tuning import Teacher, checksum_of_teacher, num_teachers, open_teacher
from hf_ddpm.training.tuning_settings import config_of_tuning
from tests.support.image_data import sort_into_kinds
from tests.support.networks import smallest_unet_config
from tests.support.trained import assert_same_weights, losses, part
from tests.support.tuned import tuned_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
KINDS = Classes(("dark", "light"), has_unconditional=True)
# What `hf-ddpm tune` would take from the run of the model.
OF_MODEL = ("model_config_name_or_path", "ddpm_num_steps", "ddpm_num_inference_steps")

STOCK = """
import sys
sys.modules["hf_ddpm"] = None  # importing it raises ImportError
import diffusers, numpy, torch
torch.set_num_threads(1)
pipeline = diffusers.DDPMPipeline.from_pretrained(sys.argv[1])
assert type(pipeline.scheduler) is diffusers.LCMScheduler
for n in (1, 2, 4):
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, generator=generator, num_inference_steps=n, output_type="np").images
    numpy.save(f"{sys.argv[2]}/{n}.npy", images)
"""


def read_card(settings: dict[str, Any]) -> str:
    return Path(settings["output_dir"], "README.md").read_text()


def save_model(folder: Path, num_classes: int | None = None, dropout: float = 0.0, **scheduler: Any) -> Path:
    """Save a model that nobody has trained, of 20 timesteps."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(**smallest_unet_config(1, num_class_embeds=num_classes, dropout=dropout))
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", **scheduler}
    pipeline = DDPMPipeline(unet, DDPMScheduler(20, timestep_spacing="trailing", **settings))
    if num_classes is not None:
        pipeline.classes = KINDS
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    model = save_model(tmp_path / "model", dropout=0.2)
    given = {name: value for name, value in tiny_settings.items() if name not in OF_MODEL}
    return {**given, "init_from": str(model), "tuned_steps": [1, 2, 4]}


@pytest.fixture
def guided(settings: dict[str, Any], image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that folds guidance into a model of two classes."""
    kinds = sort_into_kinds(image_folder, tmp_path / "kinds", KINDS.names)
    model = save_model(tmp_path / "classes", num_classes=3)
    data = {"train_data_dir": str(kinds), "label_column": "label"}
    return {**settings, **data, "init_from": str(model), "guidance_scale": 2.0, "guidance_interval": [0.1, 5.0]}


@pytest.mark.slow
def test_tuned_model_is_sampled_by_stock_to_the_same_images(settings: dict[str, Any], tmp_path: Path):
    returned = train(TrainingConfig(**settings))
    assert returned is not None
    folder = Path(settings["output_dir"])
    subprocess.run([sys.executable, "-c", STOCK, str(folder), str(tmp_path)], check=True, capture_output=True)
    ours = DDPMPipeline.from_pretrained(folder)
    for n in (1, 2, 4, 20):
        for pipeline in (ours, returned):
            generator = torch.Generator().manual_seed(0)
            (images,) = pipeline(2, generator, num_inference_steps=n, output_type="np", return_dict=False)
            if n != 20:
                np.testing.assert_array_equal(images, np.load(tmp_path / f"{n}.npy"))
    assert ours.use().sampler == returned.kept_sampler
    assert json.loads((folder / "scheduler/sampler.json").read_text()) == {
        "scheduler": "lcm",
        "num_inference_steps": 4,
    }
    assert not (folder / "guide").exists()
    card = (folder / "README.md").read_text()
    assert "It was tuned to sample in 1, 2 or 4 steps" in card
    assert "images = pipeline(batch_size=16, num_inference_steps=4).images" in card
    assert "DPMSolverMultistepScheduler" not in card
    assert "| Weight of the squared error | that of consistency tuning |" in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["settings", "guided"])
def test_resumed_run_equals_the_undisturbed_run(kind: str, request: pytest.FixtureRequest):
    """With dropout, which both evaluations of the network share, or with guidance by the model as it was."""
    whole = TrainingConfig(**request.getfixturevalue(kind), checkpoints_total_limit=None)
    train(whole)
    parted = part(whole)
    train(replace(parted, resume_from_checkpoint="latest"))
    assert losses(parted.output_dir) == losses(whole.output_dir)
    assert_same_weights(whole.output_dir, parted.output_dir)


@pytest.mark.slow
def test_resume_refuses_another_teacher(settings: dict[str, Any]):
    whole = TrainingConfig(**settings, checkpoints_total_limit=None)
    train(whole)
    parted = part(whole)
    path = Path(settings["init_from"], "unet/diffusion_pytorch_model.safetensors")
    weights = load_file(path)
    weights["conv_in.bias"][0] += 1
    save_file(weights, path)
    with pytest.raises(UsageError, match=r"^init_from must have the weights that it had .*: bring them back"):
        train(replace(parted, resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_validation_measures_each_number_of_steps(settings: dict[str, Any]):
    validated = {**settings, "eval_steps": 3, "eval_num_images": 8, "eval_split": "train"}
    validated |= {"eval_network": "efficientnet-lite0"}
    train(TrainingConfig(**validated))
    lines = read_metrics(Path(settings["output_dir"], "eval.jsonl"))
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert [*line["kid_by_steps"]] == ["1", "2", "4"]
        assert line["kid_by_steps"]["4"] == {name: line[name] for name in ("kid", "kid_standard_error")}
        assert len({measured["kid"] for measured in line["kid_by_steps"].values()}) == 3
        assert line["val_loss"] is None
    assert (
        "| Sampling steps | Kernel distance |\n|---|---|\n| 1 | "
        in Path(settings["output_dir"], "README.md").read_text()
    )


@pytest.mark.slow
def test_tuning_folds_guidance_into_the_model(guided: dict[str, Any]):
    """The prediction of the teacher is guided within the interval, and the model's own outside of it."""
    config = TrainingConfig(**guided)
    scheduler = DDPMPipeline.from_pretrained(guided["init_from"]).scheduler
    teacher = open_teacher(config, scheduler, KINDS, torch.device("cpu"))
    assert teacher.weaker is None
    assert num_teachers(config, KINDS) == 1
    plain = replace(teacher, guidance=None)
    x_t, t = torch.randn(20, 1, 8, 8), torch.arange(20)
    labels = torch.arange(20) % 2
    prediction, hidden = plain(x_t, t, labels), plain(x_t, t, torch.full((20,), 2))
    sigma = scheduler.snr(t).rsqrt()
    acts = ((sigma > 0.1) & (sigma <= 5)).view(-1, 1, 1, 1)
    assert acts.any()
    assert not acts.all()
    torch.testing.assert_close(teacher(x_t, t, labels), torch.where(acts, 2 * prediction - hidden, prediction))
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    train(config)
    tuned = DDPMPipeline.from_pretrained(guided["output_dir"])
    assert tuned.classes == KINDS
    with pytest.raises(ValueError, match="guidance must be left out for a model that was tuned for few steps"):
        tuned(1, class_labels="dark", guidance_scale=2.0)
    assert "| Guidance that is a part of it | scale 2, for sigma from 0.1 to 5 |" in read_card(guided)
    train(replace(config, guidance_scale=None, guidance_interval=None, output_dir=f"{guided['output_dir']}-plain"))
    weights = [load_file(Path(f"{guided['output_dir']}{end}", WEIGHTS)) for end in ("", "-plain")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_only_the_weights_that_teach_are_in_the_checksum(guided: dict[str, Any]):
    """Guidance by classes does without the weaker network in the folder of the model."""
    config, classes = TrainingConfig(**guided), Classes(KINDS.names, has_unconditional=False)
    before = checksum_of_teacher(config, KINDS, None)
    unet = DDPMPipeline.from_pretrained(guided["init_from"]).unet
    save_network(unet, Path(guided["init_from"], "guide"))
    assert checksum_of_teacher(config, KINDS, before) == before
    with pytest.raises(UsageError, match=r"^init_from must have the weights that it had when this run began"):
        checksum_of_teacher(config, classes, before)


def test_teacher_without_labels_is_guided_by_the_weaker_network(settings: dict[str, Any], tmp_path: Path):
    config = TrainingConfig(**settings, guidance_scale=1.5)
    scheduler = DDPMPipeline.from_pretrained(settings["init_from"]).scheduler
    with pytest.raises(UsageError, match=r"guidance_scale needs a model with labels .* with neither: leave it out"):
        open_teacher(config, scheduler, None, torch.device("cpu"))
    other = DDPMPipeline.from_pretrained(save_model(tmp_path / "other"))
    torch.nn.init.normal_(other.unet.conv_out.weight, std=0.1)
    save_network(other.unet, Path(settings["init_from"], "guide"))
    teacher = open_teacher(config, scheduler, None, torch.device("cpu"))
    assert isinstance(teacher, Teacher)
    assert teacher.guidance == Guidance(1.5)
    assert [num_teachers(replace(config, guidance_scale=scale), None) for scale in (None, 1, 1.5)] == [1, 1, 2]
    assert num_teachers(replace(config, tuned_steps=None), None) == 0
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 19])
    strong, weak = (
        Objective(scheduler).output_of(each, x_t, t, None) for each in (teacher.network, other.unet.eval())
    )
    torch.testing.assert_close(teacher(x_t, t), strong + 0.5 * (strong - weak))


@pytest.fixture
def trained(tiny_settings: dict[str, Any]) -> Path:
    """The folder of a run, as `hf-ddpm tune` finds it."""
    train(TrainingConfig(**{**tiny_settings, "random_flip": True, "train_batch_size": 2}))
    return Path(tiny_settings["output_dir"])


@pytest.mark.slow
def test_settings_are_those_of_the_run_that_trained_the_model(trained: Path, tmp_path: Path):
    config = config_of_tuning(str(trained), [1, 4], {"max_train_steps": "3"})
    assert config.train_data_dir == yaml.safe_load((trained / "config.yaml").read_text())["train_data_dir"]
    assert (config.random_flip, config.train_batch_size, config.tuned_steps) == (True, 2, [1, 4])
    assert (config.init_from, config.output_dir) == (str(trained), f"{trained}-tuned")
    assert config.max_train_steps == 3
    file = tmp_path / "more.yaml"
    file.write_text("tuned_steps: [2]\nmax_train_steps: 4\n")
    of_file = config_of_tuning(str(trained), None, {}, str(file))
    assert (of_file.tuned_steps, of_file.max_train_steps) == ([2], 4)
    assert of_file.train_data_dir == config.train_data_dir
    assert config_of_tuning(str(trained), None, {}).tuned_steps == [1, 2, 4]
    DDPMPipeline.from_pretrained(trained).use(guidance_scale=1.5).save_pretrained(trained)
    with pytest.raises(UsageError, match=r"^guidance_scale must be given, .* keeps guidance of scale 1.5"):
        config_of_tuning(str(trained), [1], {})
    (trained / "scheduler/sampler.json").unlink()

    (trained / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"^the data must be known, .* give --dataset_name or --train_data_dir$"):
        config_of_tuning(str(trained), [1], {})
    given = config_of_tuning(str(trained), [1], {"dataset_name": "digits"})
    assert (given.dataset_name, given.train_data_dir) == ("digits", None)


@pytest.mark.slow
def test_command_tunes_and_says_how_to_sample(trained: Path, tmp_path: Path):
    command = ["tune", str(trained), "--steps", "1,2", "--max_train_steps", "2", "--no_save_figures"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"Sample it with: hf-ddpm sample {trained}-tuned --out samples" in done.output
    command = ["sample", f"{trained}-tuned", "--num_images", "2", "--out", str(tmp_path / "samples")]
    sampled = CliRunner().invoke(app, command)
    assert sampled.exit_code == 0
    record = json.loads((tmp_path / "samples/samples.json").read_text())
    assert (record["scheduler"], record["num_inference_steps"]) == ("lcm", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuned_steps": []}, "tuned_steps must be different whole numbers, got"),
        ({"tuned_steps": [2, 2]}, "tuned_steps must be different whole numbers, got"),
        ({"tuned_steps": [0]}, "tuned_steps must be at least 1, got 0"),
        ({"tuned_steps": [21]}, r"tuned_steps must be in \[1, 20\], got 21"),
        ({"loss_weighting": "min_snr"}, "loss_weighting = min_snr has no effect on a model that is tuned"),
        ({"timestep_density": "uniform"}, "timestep_density = uniform has no effect on a model that is tuned"),
        ({"init_from": None}, r"tuned_steps = \[1, 2, 4\] has no effect"),
        ({"stable_target_images": 16}, "stable_target_images = 16 has no effect on a model that is tuned"),
        ({"augment_probability": 0.1}, "augment_probability = 0.1 has no effect on a model that is tuned"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, got 0.5"),
        ({"guidance_scale": 1.0, "guidance_interval": [1.0, 2.0]}, "guidance_interval = .* has no effect"),
        ({"guidance_interval": [1.0, 2.0]}, "guidance_interval = .* has no effect"),
        ({"guidance_scale": 2.0, "guidance_interval": [-1.0, 2.0]}, "2 rising numbers of at least 0"),
        ({"ddpm_num_inference_steps": 5}, "ddpm_num_inference_steps = 5 has no effect"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        train(TrainingConfig(**{**settings, **changes}))
    assert not Path(settings["output_dir"]).exists()


def test_model_that_predicts_noise_is_refused(settings: dict[str, Any], tmp_path: Path):
    model = save_model(tmp_path / "noise", prediction_type="epsilon")
    with pytest.raises(UsageError, match=r"prediction_type must be v_prediction or sample .*, got epsilon"):
        train(TrainingConfig(**{**settings, "init_from": str(model)}))
    assert not Path(settings["output_dir"]).exists()


def test_tuned_model_is_no_teacher(settings: dict[str, Any], tmp_path: Path):
    """Its x_0_hat is the end of a path, and no mean from which a solver could go along one."""
    tuned_pipeline(num_train_timesteps=20).save_pretrained(tmp_path / "tuned")
    with pytest.raises(UsageError, match="init_from must be a model that was not tuned for few steps"):
        train(TrainingConfig(**{**settings, "init_from": str(tmp_path / "tuned")}))


def test_guidance_without_anything_to_guide_by_is_refused_before_the_data(settings: dict[str, Any], tmp_path: Path):
    with pytest.raises(UsageError, match=r"guidance_scale needs a model with labels .* with neither: leave it out"):
        train(TrainingConfig(**{**settings, "guidance_scale": 2.0, "cache_dir": str(tmp_path / "none")}))
    assert not (tmp_path / "none").exists()


def test_labels_that_the_model_does_not_know_are_refused(settings: dict[str, Any], image_folder: Path, tmp_path: Path):
    kinds = sort_into_kinds(image_folder, tmp_path / "kinds", KINDS.names)
    labeled = {**settings, "train_data_dir": str(kinds), "label_column": "label", "cache_dir": str(tmp_path / "none")}
    with pytest.raises(UsageError, match="images must have no labels where a model without labels is tuned"):
        train(TrainingConfig(**labeled))
    assert not (tmp_path / "none").exists()
    assert not Path(settings["output_dir"]).exists()


def test_teacher_is_not_overwritten(settings: dict[str, Any]):
    with pytest.raises(UsageError, match="output_dir must not hold the model that is tuned"):
        train(TrainingConfig(**{**settings, "output_dir": settings["init_from"], "overwrite_output_dir": True}))
