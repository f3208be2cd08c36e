"""The card says what the run recorded, and nothing else."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard

import hf_ddpm
from hf_ddpm.classes import Classes, write_classes
from hf_ddpm.hub import card as card_module
from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.readme import named_repository
from hf_ddpm.runtime.errors import UsageError
from tests.support.cards import (
    CONFIG,
    FIGURES,
    RUN,
    SCHEDULER,
    TOKEN,
    UNET,
    assert_no_trace_of_absence,
    card_of,
    count,
    imported,
    make_run,
    numbers,
    snippets,
)
from tests.support.networks import smallest_unet_config

HO_2020 = yaml.safe_load("""
    {ddpm_num_steps: 1000, ddpm_beta_schedule: linear, ddpm_beta_start: 0.0001, ddpm_beta_end: 0.02,
     prediction_type: epsilon, variance_type: fixed_large, loss_weighting: constant, timestep_density: uniform,
     optimizer: adamw, adam_weight_decay: 0.0, learning_rate: 0.0002, lr_scheduler: constant_with_warmup,
     lr_warmup_steps: 5000, dropout: 0.1, random_flip: true}
""")


VARIANTS = {
    "plain": {},
    "T=1000": {"scheduler": SCHEDULER | {"num_train_timesteps": 1000}},
    "sigmoid": {"scheduler": SCHEDULER | {"beta_schedule": "sigmoid"}},
    "step denoiser": {"scheduler": SCHEDULER | {"prediction_type": "previous_sample"}},
    "classes": {"unet": UNET | {"num_class_embeds": 10}},
}


def test_write_card_shows_every_recorded_value(tmp_path: Path):
    card = card_of(tmp_path)
    recorded = deepcopy(RUN)
    seconds = recorded["training"].pop("seconds")
    for number in numbers(recorded):
        assert count(number, card), number
    assert f"1 h 12 min ({seconds:,.0f} s)" in card
    for text in ("ab" * 32, "AMD EPYC (2 cores)", "bf16", "CC BY 4.0", "torch 2.13.0", "averaged weights (EMA)"):
        assert text in card
    assert "The last logged loss is 0.3333, at step 30." in card  # not the line that was cut off
    assert "| Images per second (median) | 92 |" in card
    for name in FIGURES:
        assert f"(figures/{name})" in card


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, values in RUN.items() for key in values])
def test_write_card_leaves_out_the_sentence_of_a_missing_value(tmp_path: Path, section: str, key: str):
    full = card_of(tmp_path)
    run = deepcopy(RUN)
    del run[section][key]
    card = card_of(tmp_path, run=run)
    assert (card != full) == (RUN[section][key] is not None)
    for number in numbers(RUN[section][key]) if key != "seconds" else ["4,322 s"]:
        assert count(number, card) < count(number, full)
    assert_no_trace_of_absence(card)


def test_write_card_of_empty_folder_has_no_number(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    card = write_card(folder).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.S)
    assert not re.search(r"\d", prose.replace("x_0", "").replace("_0_hat", "")), prose
    assert "figures/" not in card
    assert f'"{folder}"' in card
    assert_no_trace_of_absence(card)
    with pytest.raises(UsageError, match="not a folder"):
        write_card(tmp_path / "nothing")


def test_write_card_writes_metadata_that_the_hub_reads_back(tmp_path: Path):
    card_of(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "license": "cc-by-4.0",
        "datasets": ["someone/pictures"],
        "tags": ["diffusers", "ddpm", "hf_ddpm", "unconditional-image-generation"],
    }


@pytest.mark.parametrize("license", [None, "", "ask the photographer", "other"])
def test_metadata_leave_out_a_license_unknown_to_the_hub(tmp_path: Path, license: str | None):
    card = card_of(tmp_path, run=RUN | {"data": RUN["data"] | {"license": license}})
    assert ModelCard(card).data.license is None
    assert (
        f"| License of the data | {license} |" in card if license else "license of the data was not recorded" in card
    )


@pytest.mark.parametrize("name", [None, "digits", "./photos", "a/b/c", "~/photos", "/photos"])
def test_metadata_name_only_hub_ids_as_dataset(tmp_path: Path, name: str | None):
    assert ModelCard(card_of(tmp_path, config=CONFIG | {"dataset_name": name})).data.datasets is None


def test_metadata_do_not_name_a_local_folder_as_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelCard(card_of(tmp_path, config=CONFIG | {"dataset_name": "data/photos"})).data.datasets is None


@pytest.mark.slow
def test_settings_table_finds_the_settings_of_ho_et_al_equal_but_for_the_average(tmp_path: Path):
    def rows(**parts: Any) -> dict[str, list[str]]:
        table = re.findall(r"^\| (.*) \| (.*) \| (.*) \| (\*\*differs\*\*|same) \|$", card_of(tmp_path, **parts), re.M)
        return {name: rest for name, *rest in table}

    training = {"global_batch_size": 128, "steps": 800_000}
    ho = rows(config=CONFIG | HO_2020, run={"training": training}, scheduler={}, unet={})
    assert len(ho) == 16
    assert [name for name, row in ho.items() if row[2] != "same"] == ["Averaged weights (EMA)"]
    ours = rows()
    assert len(ours) == 16
    assert ours["Chain length T"] == ["500", "1,000", "**differs**"]
    assert ours["Noise schedule"][0] == "cosine"
    assert ours["Target averaged over"] == ["the image", "the image", "same"]
    stable = rows(config=CONFIG | {"stable_target_images": 4096})
    assert stable["Target averaged over"] == ["the image and 4,096 others", "the image", "**differs**"]
    assert ours["Distribution of t"][0].startswith("nine tenths: log(sigma_t) normal with mean -0.4 and std 1.2")
    assert ours["Optimizer"][0].startswith("Muon for the matrices of blocks; for the rest AdamW")
    assert ours["Gradients clipped to the norm"][2] == "same"
    assert "Images per step" not in rows(run={})
    assert rows(config=CONFIG | {"use_ema": False})["Averaged weights (EMA)"][0] == "none"
    assert "Learning rate" not in rows(config={k: v for k, v in CONFIG.items() if k != "lr_warmup_steps"})


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_examples_import_only_what_they_announce(tmp_path: Path, parts: dict[str, Any]):
    card = card_of(tmp_path, **parts)
    *stock, ours = snippets(card)
    assert all(imported(code) <= {"diffusers", "torch"} for code in stock)
    assert imported(ours) == {"hf_ddpm", "torch"}
    assert '"me/photos"' in ours
    assert_no_trace_of_absence(card)


@pytest.mark.slow
def test_examples_fit_the_model(tmp_path: Path):
    codes = {name: snippets(card_of(tmp_path, **parts)) for name, parts in VARIANTS.items()}
    assert [len(code) for code in codes.values()] == [3, 3, 2, 1, 2]
    assert "num_inference_steps=500" in codes["plain"][0]
    assert "num_inference_steps" not in codes["T=1000"][0]
    assert "num_inference_steps=500" in codes["step denoiser"][0]
    assert "ConsistencyModelPipeline" in codes["classes"][0]
    assert all("[i % 10 for i in range(16)]" in code for code in codes["classes"])
    assert "cannot sample it" in card_of(tmp_path, **VARIANTS["step denoiser"])
    learned = SCHEDULER | {"variance_type": "learned_range"}
    assert len(snippets(card_of(tmp_path, scheduler=learned))) == 3
    assert len(snippets(card_of(tmp_path, scheduler=learned, unet=UNET | {"in_channels": 1}))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [None, 4])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
def test_examples_run(tmp_path: Path, one_thread: None, num_classes: int | None):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    blocks |= {"num_class_embeds": num_classes}
    unet = UNet2DModel(8, 1, 1, norm_num_groups=4, layers_per_block=1, add_attention=False, **blocks)
    scheduler = DDPMScheduler(
        30, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    card = write_card(tmp_path, str(tmp_path)).read_text(encoding="utf-8")
    codes = snippets(card)
    assert len(codes) == (3 if num_classes is None else 2)
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 16
    assert names["trajectory"][0].x_0_hat.shape == (16, 1, 8, 8)


def test_stock_pipeline_that_the_card_names_samples_the_classes_of_ours(tmp_path: Path):
    unet = UNet2DModel(**smallest_unet_config(1, num_class_embeds=4))
    scheduler = DDPMScheduler(8, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    images = []
    for kind in (ConsistencyModelPipeline, hf_ddpm.DDPMPipeline):
        pipeline: Any = kind.from_pretrained(tmp_path)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 8, "class_labels": [1, 3], "output_type": "np"}
        images.append(pipeline(batch_size=2, generator=generator, **settings).images)
    assert np.array_equal(*images)


def test_write_card_never_shows_a_token(tmp_path: Path):
    assert TOKEN not in card_of(tmp_path, config=CONFIG | {"hub_token": TOKEN, "api_key": TOKEN})


def test_examples_load_the_revision(tmp_path: Path):
    text = write_card(make_run(tmp_path), "me/photos", "std-0.1").read_text(encoding="utf-8")
    assert all('from_pretrained("me/photos", revision="std-0.1")' in code for code in snippets(text))
    assert "This is the model's revision `std-0.1`." in text
    assert named_repository(text) == "me/photos"


@pytest.mark.parametrize("hub_model_id", [None, "photos"])
def test_examples_of_a_run_that_is_not_on_the_hub_load_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_model_id: str | None
):
    make_run(tmp_path / "runs/emoji", config=CONFIG | {"hub_model_id": hub_model_id})
    monkeypatch.chdir(tmp_path)
    for folder, name in (("runs/emoji", "./runs/emoji"), (tmp_path / "runs/emoji", f"{tmp_path}/runs/emoji")):
        text = write_card(folder).read_text(encoding="utf-8")
        assert all(f'from_pretrained("{name}")' in code for code in snippets(text))
        assert f"# {hub_model_id or 'emoji'}\n" in text
    assert 'from_pretrained("me/emoji")' in write_card("runs/emoji", "me/emoji").read_text(encoding="utf-8")
    assert 'from_pretrained("me/emoji")' in write_card("runs/emoji").read_text(encoding="utf-8")


def test_write_card_names_the_base_model_of_a_finetuned_model(tmp_path: Path):
    text = card_of(tmp_path, config=CONFIG | {"init_from": "google/ddpm-cifar10-32"})
    assert "began with the weights of [google/ddpm-cifar10-32]" in text
    assert ModelCard(text).data.base_model == "google/ddpm-cifar10-32"
    other = card_of(tmp_path / "other", config=CONFIG | {"init_from": "/models/mine"})
    assert ModelCard(other).data.base_model is None


def test_write_card_shows_validation_curves(tmp_path: Path):
    text = card_of(tmp_path, figures=("kid.png", "val_loss.png"), config=CONFIG | {"eval_num_images": 1234})
    assert "(figures/kid.png)" in text
    assert "(figures/val_loss.png)" in text
    assert "kernel distance between 1,234 samples and images of the split `test` during training" in text
    assert "on features of efficientnet-lite0" in text


def test_write_card_reports_a_last_loss_that_is_nan(tmp_path: Path):
    (make_run(tmp_path) / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n')
    assert "The last logged loss is nan, at step 2." in write_card(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "YAML 1.1 takes it for text": (
            "config.yaml",
            "learning_rate: 1e-4\nlr_scheduler: linear\nlr_warmup_steps: 0\n",
        ),
        "one for several": ("config.yaml", "ema_halflife_images: 500\nuse_ema: true\n"),
        "a number for a line": ("metrics.jsonl", "5\n"),
        "a list": ("run.json", "[1]"),
        "a result of nothing": ("evaluation.json", '{"results": [{"metric": "fd", "name": "FD", "value": 1}]}'),
        "a tag for several": ("README.md", "---\ntags: 5\n---\n"),
    }.values(),
)
def test_write_card_names_a_damaged_file(tmp_path: Path, name: str, text: str):
    folder = make_run(tmp_path)
    (folder / name).write_text(text)
    said = {"README.md": r"README\.md cannot be read: ", "run.json": r"run\.json cannot be read: it must be a mapping"}
    said["metrics.jsonl"] = r"metrics\.jsonl cannot be read: no step in line 1"
    with pytest.raises(UsageError, match=said.get(name, "the card cannot be written: ") + ".*: correct "):
        write_card(folder)


def test_recorded_text_cannot_break_a_table(tmp_path: Path):
    write_classes(tmp_path, Classes(("x|y",) * 30))
    card = card_of(tmp_path, run={"training": {"device": "a|b\nc"}}, unet={"num_class_embeds": 30})
    assert r"| Device | a\|b c |" in card
    assert r"| Classes | 30: x\|y, " in card
    assert_no_trace_of_absence(card)


def test_template_is_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model_card").mkdir()
    (tmp_path / "model_card" / "template.md").write_text("packaged")
    assert "{{ card_data }}" in card_module._template()
    monkeypatch.setattr(card_module.resources, "files", lambda package: tmp_path)
    assert card_module._template() == "packaged"


def test_validation_of_each_class_stands_on_the_card(tmp_path: Path):
    by_class = {"boot|s": {"kid": 0.125, "kid_standard_error": 0.0104, "val_loss": 0.03}}
    lines = [{"step": 10, "by_class": {}}, {"step": 1200, "by_class": by_class}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card_of(tmp_path)
    assert "At step 1,200, by class." in text
    assert r"| boot\|s | 0.125 ± 0.010 | 0.03 |" in text
