"""train(config) from images to a model that stock loads, and what a run must not lose."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

import hf_ddpm.network
from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.cli import app
from hf_ddpm.data.batches import MicroBatches, to_x_0
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.seeds import first_stratum, image_draws
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.draws import hide_labels
from hf_ddpm.training.loop import train
from hf_ddpm.training.schedules import learning_rate_schedule
from hf_ddpm.training.start import find_start
from tests.support.networks import ATTENTION, smallest_unet_config
from tests.support.runs import differences
from tests.support.trained import losses, metrics, model_file, weights

ROOT = Path(__file__).parents[2]
NO_AVERAGE = {"use_ema": False, "ema_snapshots": 0}


@pytest.mark.slow
def test_train_leaves_a_model_pictures_and_a_card(tiny_settings, capsys):
    config = TrainingConfig(**{**tiny_settings, "ddpm_num_inference_steps": None, "save_figures": True})
    assert type(train(config)) is DDPMPipeline
    said = capsys.readouterr().err
    assert re.search(r"^images\d+: 24 images, 8 x 8, channels 1$", said, re.MULTILINE)
    assert "it is written to " in said
    assert "the next preview after step 6\n" in said
    for work in ("checkpoint", "samples"):
        assert f"{work}:  " in said  # on a bar
    folder = Path(config.output_dir)
    pipeline = DDPMPipeline.from_pretrained(folder)
    stock = diffusers.DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs, ours = (
        p(generator=torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
        for p in (stock, pipeline)
    )
    assert np.array_equal(theirs, ours)

    for name in ("samples.png", "loss.png", "forward.png", "reverse.png", "reverse.gif"):
        with Image.open(folder / "figures" / name) as image:
            image.load()
    assert [p.name for p in sorted((folder / "previews").iterdir())] == ["step-0000006.png"]
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in metrics(folder)] == [4, 8, 12, 16, 20, 24]

    assert not (folder / "eval.jsonl").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["training"]["images"] == 24
    assert (run["samples"]["scheduler"], run["samples"]["num_inference_steps"]) == ("UniPCMultistepScheduler", 20)
    assert run["data"]["num_images"] == 24
    assert run["model"]["num_parameters"] == sum(p.numel() for p in pipeline.unet.parameters())
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert run["data"]["fingerprint"] in card.content
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (written["resolution"], written["channels"], written["mixed_precision"]) == (8, 1, "no")


@pytest.mark.slow
def test_first_loss_is_the_power_of_the_target(tiny_settings):
    """The network's output starts at zero; stock's starts above the target's own power."""
    train(TrainingConfig(**{**tiny_settings, "prediction_type": "epsilon", "train_batch_size": 64}))
    assert losses(tiny_settings["output_dir"])[0] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_loader_workers_change_no_bit(tiny_settings, tmp_path):
    config = TrainingConfig(**tiny_settings)
    train(config)
    other = replace(config, output_dir=str(tmp_path / "workers"), dataloader_num_workers=2)
    train(other)
    assert losses(other.output_dir) == losses(config.output_dir)


@pytest.mark.slow
def test_accumulation_equals_a_larger_batch(tiny_settings, tmp_path):
    """One batch of 8, two parts of 4: the same images, t and eps, LR and average."""
    whole = TrainingConfig(**{**tiny_settings, "train_batch_size": 8})
    parts = replace(whole, train_batch_size=4, gradient_accumulation_steps=2, output_dir=str(tmp_path / "parts"))
    for config in (whole, parts):
        train(config)
    assert losses(parts.output_dir) == pytest.approx(losses(whole.output_dir), abs=1e-5)
    for key in ("lr", "ema_decay", "images"):
        assert [m[key] for m in metrics(parts.output_dir)] == [m[key] for m in metrics(whole.output_dir)]
    a, b = weights(whole.output_dir), weights(parts.output_dir)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


def test_learning_rate_reaches_peak_and_end_in_optimizer_steps():
    config = TrainingConfig(lr_warmup_steps=50, gradient_accumulation_steps=4)
    learning_rate = learning_rate_schedule(config, 1000, 32, Processes())
    peak = config.peak_learning_rate
    assert learning_rate(50 * 32) == peak
    assert learning_rate(25 * 32) == 0.5 * peak
    assert learning_rate(1000 * 32) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("warmup", "is_said"), [(5, False), (6, True)])
def test_too_long_a_warmup_is_reported(tiny_settings, capsys, warmup, is_said):
    train(TrainingConfig(**{**tiny_settings, "max_train_steps": 6, "lr_warmup_steps": warmup}))
    assert (f"6 steps of the run, got {warmup}: the learning rate never" in capsys.readouterr().err) == is_said
    reached = max(line["lr"] for line in metrics(tiny_settings["output_dir"])) == TrainingConfig().peak_learning_rate
    assert reached != is_said


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "previous_sample"},
        {"prediction_type": "sample", "loss_weighting": "min_snr"},
        {"prediction_type": "epsilon", "timestep_density": "uniform", **NO_AVERAGE},
        {"rescale_betas_zero_snr": True, "save_images_epochs": 1, "save_model_epochs": 1},
        {"mixed_precision": "bf16", "lr_scheduler": "constant", "lr_warmup_steps": 0},
        {"num_epochs": 1, "max_train_steps": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_train_accepts_these_settings(tiny_settings, changes):
    config = TrainingConfig(**{**tiny_settings, **changes})
    pipeline = train(config)
    assert all(np.isfinite(losses(config.output_dir)))
    assert all(p.isfinite().all() for p in pipeline.unet.parameters())
    assert len(metrics(config.output_dir)) == 6


@pytest.mark.slow
def test_learned_variance_trains_the_variance_channels(tiny_settings, tmp_path):
    model = model_file(tmp_path, out_channels=2)
    config = TrainingConfig(
        **{**tiny_settings, "variance_type": "learned_range", "model_config_name_or_path": model, **NO_AVERAGE}
    )
    pipeline = train(config)
    assert pipeline.unet.conv_out.weight[1].abs().max() > 0
    assert type(pipeline.scheduler) is DDPMScheduler


@pytest.mark.slow
def test_train_learns_classes_from_the_label_column(tiny_settings, tmp_path):
    model = tmp_path / "classes.json"
    model.write_text(json.dumps(smallest_unet_config(channels=1, num_class_embeds=11)))
    settings = {k: v for k, v in tiny_settings.items() if k != "train_data_dir"}
    settings |= {"dataset_name": "digits", "label_column": "label", "model_config_name_or_path": str(model)}
    pipeline = train(TrainingConfig(**settings))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, class_labels=[0, 9]).images[1].size == (8, 8)


@pytest.mark.slow
def test_tracker_gets_the_values_of_metrics(tiny_settings):
    train(TrainingConfig(**tiny_settings, logger="tensorboard"))
    assert list((Path(tiny_settings["output_dir"]) / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_train_without_ema_returns_the_model_in_eval_mode(tiny_settings, tmp_path):
    model = model_file(tmp_path, dropout=0.5)
    pipeline = train(TrainingConfig(**{**tiny_settings, "model_config_name_or_path": model, **NO_AVERAGE}))
    assert not pipeline.unet.training


@pytest.mark.slow
def test_train_accepts_a_schedule_without_solver(tiny_settings):
    train(TrainingConfig(**{**tiny_settings, "ddpm_beta_schedule": "sigmoid", "ddpm_beta_end": 0.9}))


def test_train_refuses_an_output_dir_among_the_images(tiny_settings, tmp_path):
    folder = Path(tiny_settings["train_data_dir"])
    with pytest.raises(UsageError, match="output_dir must not be in the folder of images"):
        train(TrainingConfig(**{**tiny_settings, "output_dir": str(folder / "run")}))


def test_fp16_on_a_cpu_is_refused(tiny_settings):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        train(TrainingConfig(**tiny_settings, mixed_precision="fp16"))


def test_stable_target_needs_enough_images(tiny_settings):
    config = TrainingConfig(**tiny_settings, stable_target_images=21)
    with pytest.raises(
        UsageError, match="must be at most 20, got 21: the data are 24 images, of which a step takes 4"
    ):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_loss_uses_the_stable_target(tiny_settings, tmp_path, labels):
    """The first one, of a network that says 0, by the objective on the images that the stream has."""
    changes: dict = {"stable_target_images": 17, "ddpm_num_steps": 100, "max_train_steps": 1, "random_flip": True}
    if labels:
        folder = tmp_path / "classes"
        for i, image in enumerate(sorted(Path(tiny_settings["train_data_dir"]).iterdir())):
            (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            (folder / f"class{i % 2}" / image.name).write_bytes(image.read_bytes())
        model = tmp_path / "conditional.json"
        model.write_text(json.dumps(smallest_unet_config(channels=1, num_class_embeds=3)))
        changes |= {"train_data_dir": str(folder), "label_column": "label", "model_config_name_or_path": str(model)}
        changes["class_dropout"] = 0.5
    config = TrainingConfig(**{**tiny_settings, **changes})
    pipeline = train(config)
    assert pipeline is not None
    batch = MicroBatches(
        load_images(config),
        seed=0,
        random_flip=True,
        batch_size=4,
        accumulation_steps=1,
        rank=0,
        num_processes=1,
        first_position=0,
        num_steps=1,
        num_extra_images=17,
    )[0]
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    hidden = hide_labels(0, torch.arange(4), batch.get("labels"), Classes(("class0", "class1"), True), 0.5)
    if labels:  # an image of each kind: the target of the one is over its class, that of the other over all
        assert 0 < int((hidden == 2).sum()) < 4
    wanted = {}
    for num_extra_images in (0, 17):
        extra_images = to_x_0(batch["extra_images"], 255) if num_extra_images else None
        objective = Objective(scheduler, density="lognormal", unconditional_class=2)
        uniform, noise = image_draws(0, torch.arange(4), (1, 8, 8), "cpu")
        loss = objective(
            lambda x_t, t, **_: SimpleNamespace(sample=torch.zeros_like(x_t)),
            to_x_0(batch["pixels"], 255),
            hidden,
            timesteps=objective.timesteps_from_uniform(
                uniform, first_index=first_stratum(0, 0, 4), global_batch_size=4
            ),
            noise=noise,
            extra_images=extra_images,
            extra_labels=batch.get("extra_labels") if num_extra_images else None,
        )
        wanted[num_extra_images] = loss.mean().item()
    line = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(wanted[17], rel=1e-5)
    assert abs(wanted[17] - wanted[0]) > 1e-3


@pytest.mark.slow
def test_unreadable_image_is_named_or_counted(tiny_settings, tmp_path, image_folder):
    folder = tmp_path / "some"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes((image_folder / f"{i:02d}.png").read_bytes())
    (folder / "broken.png").write_bytes(b"not an image")
    config = TrainingConfig(**{**tiny_settings, "train_data_dir": str(folder)})
    with pytest.raises(UsageError, match=r"broken\.png.*--on_bad_image skip"):
        train(config)
    assert not Path(config.output_dir).exists()
    train(replace(config, on_bad_image="skip"))
    assert "Unreadable images left out | 1" in (Path(config.output_dir) / "README.md").read_text()


@pytest.mark.parametrize("epochs", [{"save_images_epochs": 1}, {"save_model_epochs": 1}, {"max_train_steps": None}])
def test_unknown_number_of_images_allows_nothing_by_epochs(tiny_settings, epochs):
    config = TrainingConfig(**{**tiny_settings, "streaming": True, **epochs})
    images = replace(open_stream(config), num_images=None)
    with pytest.raises(UsageError, match="save_images_epochs and save_model_epochs left out"):
        find_start(config, images, Processes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train_data_dir nothing", "there is no folder"),
        ("--dataset_name digits --resolution 30", "the nearest is 28 or 32"),
        ("--dataset_name digits --model_config_name_or_path cifar10-ddpm", "in_channels of the model config"),
        ("--dataset_name digits --image_column img", "image_column must be one of ['image']"),
        ("--dataset_name digits --label_column class", "label_column must be one of"),
    ],
)
def test_train_command_refuses_before_it_writes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *arguments.split(), "--output_dir", "run"])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_script_refuses_before_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_accelerate.py", "--resolution", "30", "--output_dir", "run"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_accelerate.py"), run_name="__main__")
    assert end.value.code == 2
    assert "the nearest is 28 or 32" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compile_trains_and_saves_the_network_itself(tiny_settings, tmp_path, monkeypatch, capsys):
    compiled = []

    def compile_without_code(model, **settings):  # the graph as torch.compile finds it, run as it is
        compiled.append(torch._dynamo.testing.CompileCounter())
        return compile(model, backend=compiled[-1], **settings)

    compile = torch.compile
    # Which rounds otherwise than the kernel that is used without compilation.
    monkeypatch.setattr(hf_ddpm.network, "use_plain_attention", lambda *_: None)
    network = smallest_unet_config(channels=1, **ATTENTION)
    Path(tiny_settings["model_config_name_or_path"]).write_text(json.dumps(network))
    train(TrainingConfig(**tiny_settings))
    assert "the network is compiled: " not in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", compile_without_code)
    train(TrainingConfig(**{**tiny_settings, "output_dir": str(tmp_path / "compiled"), "compile": True}))
    assert compiled[0].frame_count == 1  # for all steps and previews
    assert capsys.readouterr().err.count("the network is compiled: ") == 1
    assert differences(tmp_path / "run", tmp_path / "compiled") == []


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_result(tiny_settings, tmp_path, monkeypatch):
    """Blocks are run once more in the backward pass, with the same dropout, and give the same model."""
    again = []
    recompute = torch.utils.checkpoint.checkpoint

    def counted(*arguments, **settings):
        again.append(1)
        return recompute(*arguments, **settings)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    config_file = Path(tiny_settings["model_config_name_or_path"])
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "dropout": 0.5}))
    train(TrainingConfig(**tiny_settings))
    assert not again
    changed = TrainingConfig(
        **{**tiny_settings, "output_dir": str(tmp_path / "checkpointed"), "gradient_checkpointing": True}
    )
    train(changed)
    assert again
    assert differences(tmp_path / "run", tmp_path / "checkpointed") == []
