"""The card says what the run recorded and nothing else; the upload takes what is listed and nothing else."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard

from hf_ddpm.hub import card as cards
from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.readme import own_text
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.training.config import TrainingConfig

SEED = 1001
TOKEN = "hf_" + "secretsecret"
CONFIG = {
    key: value
    for key, value in vars(
        TrainingConfig(
            dataset_name="someone/pictures", hub_model_id="me/photos", ddpm_num_steps=500, output_dir="runs/photos"
        )
    ).items()
    if key != "hub_token"
}
RUN = {
    "versions": {"hf_ddpm": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "accelerate": "1.15.0"},
    "data": {
        "name": "someone/pictures",
        "num_images": 1797,
        "num_bad_images": 3,
        "resolution": 24,
        "channels": 3,
        "class_names": None,
        "fingerprint": "ab" * 32,
        "license": "CC BY 4.0",
    },
    "model": {"num_parameters": 1234567, "abar_T": 2.5e-05},
    "training": {
        "steps": 5432,
        "images": 173824,
        "seconds": 4321.5,
        "num_processes": 2,
        "global_batch_size": 33,
        "device": "AMD EPYC (2 cores)",
        "mixed_precision": "bf16",
        "num_resumes": 7,
    },
    "samples": {"scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 19, "seed": SEED, "ema": True},
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 500,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
}
UNET = {"_class_name": "UNet2DModel", "sample_size": 24, "in_channels": 3, "num_class_embeds": None, "dropout": 0.0}
FIGURES = ("samples.png", "loss.png", "forward.png", "reverse.png", "reverse.gif")
HO_2020 = yaml.safe_load("""
    {ddpm_num_steps: 1000, ddpm_beta_schedule: linear, ddpm_beta_start: 0.0001, ddpm_beta_end: 0.02,
     prediction_type: epsilon, variance_type: fixed_large, loss_weighting: constant, timestep_density: uniform,
     optimizer: adamw, adam_weight_decay: 0.0, learning_rate: 0.0002, lr_scheduler: constant_with_warmup,
     lr_warmup_steps: 5000, dropout: 0.1, random_flip: true}
""")


def make_run(folder: Path, config=CONFIG, run=RUN, scheduler=SCHEDULER, unet=UNET, figures=FIGURES) -> Path:
    for name in ("unet", "scheduler", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "unet/config.json").write_text(json.dumps(unet))
    (folder / "model_index.json").write_text("{}")
    for name in figures:
        (folder / "figures" / name).write_bytes(b"")
    lines = [{"step": 10 * i, "loss": 1 / i, "images_per_second": 90.0 + i} for i in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 40, "lo')
    return folder


def card_of(folder: Path, **parts: Any) -> str:
    return write_card(make_run(folder, **parts)).read_text(encoding="utf-8")


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.S)


def imported(code: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {getattr(node, "module", None) or node.names[0].name for node in nodes}


def numbers(value: Any) -> list[str]:
    """The numbers in a record, as the card writes them."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [f"{value:,}" if isinstance(value, int) and value != SEED else f"{value:.4g}"]


def count(number: str, card: str) -> int:
    return len(re.findall(rf"(?<![\d,.]){re.escape(number)}(?![\d,]*\d)", card))


def test_every_recorded_value_is_on_the_card(tmp_path: Path):
    card = card_of(tmp_path)
    recorded = deepcopy(RUN)
    seconds = recorded["training"].pop("seconds")
    for number in numbers(recorded):
        assert count(number, card), number
    assert f"1 h 12 min 2 s ({seconds:,.0f} s)" in card
    for text in ("ab" * 32, "AMD EPYC (2 cores)", "bf16", "CC BY 4.0", "torch 2.13.0", "averaged weights (EMA)"):
        assert text in card
    assert "The last logged loss is 0.3333, at step 30." in card  # not the line that was cut off
    assert "| Images per second (median) | 92 |" in card
    for name in FIGURES:
        assert f"(figures/{name})" in card


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, values in RUN.items() for key in values])
def test_a_value_that_was_not_recorded_takes_its_sentence_with_it(tmp_path: Path, section: str, key: str):
    full = card_of(tmp_path)
    run = deepcopy(RUN)
    del run[section][key]
    card = card_of(tmp_path, run=run)
    assert (card != full) == (RUN[section][key] is not None)
    for number in numbers(RUN[section][key]) if key != "seconds" else ["4,322 s"]:
        assert count(number, card) < count(number, full)
    assert_no_trace_of_absence(card)


def assert_no_trace_of_absence(card: str) -> None:
    assert not re.search(r"None|Undefined|nan\b|\{\{|\{%|\n\n\n|  ,| \.(?!\.)|[^\n]\n## ", card)
    for table in re.findall(r"(?:^\|.*\n)+", card, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_an_empty_folder_has_a_card_without_a_number(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    card = write_card(folder).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.S)
    assert not re.search(r"\d", prose.replace("x_0", "").replace("_0_hat", "")), prose
    assert "figures/" not in card
    assert '"photos"' in card
    assert_no_trace_of_absence(card)
    with pytest.raises(UsageError, match="not a folder"):
        write_card(tmp_path / "nothing")


def test_metadata_survive_a_round_trip(tmp_path: Path):
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
def test_a_license_that_the_hub_does_not_know_stays_out_of_the_metadata(tmp_path: Path, license: str | None):
    card = card_of(tmp_path, run=RUN | {"data": RUN["data"] | {"license": license}})
    assert ModelCard(card).data.license is None
    assert f"| License of the data | {license} |" in card if license else "license of the data is not recorded" in card


@pytest.mark.parametrize("name", [None, "digits", "./photos", "a/b/c", "~/photos", "/photos"])
def test_only_a_hub_id_is_named_as_a_dataset(tmp_path: Path, name: str | None):
    assert ModelCard(card_of(tmp_path, config=CONFIG | {"dataset_name": name})).data.datasets is None


def test_a_local_folder_is_not_named_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelCard(card_of(tmp_path, config=CONFIG | {"dataset_name": "data/photos"})).data.datasets is None


def test_settings_of_ho_et_al_are_all_the_same_but_for_the_ramp_of_the_average(tmp_path: Path):
    def rows(**parts: Any) -> dict[str, list[str]]:
        table = re.findall(r"^\| (.*) \| (.*) \| (.*) \| (\*\*differs\*\*|same) \|$", card_of(tmp_path, **parts), re.M)
        return {name: rest for name, *rest in table}

    training = {"global_batch_size": 128, "steps": 800_000}
    ho = rows(config=CONFIG | HO_2020, run={"training": training}, scheduler={}, unet={})
    assert len(ho) == 15
    assert [name for name, row in ho.items() if row[2] != "same"] == ["Averaged weights (EMA)"]
    ours = rows()
    assert len(ours) == 15
    assert ours["Chain length T"] == ["500", "1,000", "**differs**"]
    assert ours["Noise schedule"][0] == "cosine"
    assert ours["Target averaged over"] == ["the image", "the image", "same"]
    stable = rows(config=CONFIG | {"stable_target_images": 4096})
    assert stable["Target averaged over"] == ["the image and 4,096 others", "the image", "**differs**"]
    assert ours["Draws of t"][0] == "nine tenths log(sigma_t) normal, mean -0.4, std 1.2; a tenth uniform; stratified"
    assert ours["Optimizer"][0].startswith("Muon for the matrices of blocks, else AdamW")
    assert ours["Limit of the gradient's norm"][2] == "same"
    assert "Images per step" not in rows(run={})
    assert rows(config=CONFIG | {"use_ema": False})["Averaged weights (EMA)"][0] == "none"
    assert "Learning rate" not in rows(config={k: v for k, v in CONFIG.items() if k != "lr_warmup_steps"})


VARIANTS = {
    "plain": {},
    "T=1000": {"scheduler": SCHEDULER | {"num_train_timesteps": 1000}},
    "sigmoid": {"scheduler": SCHEDULER | {"beta_schedule": "sigmoid"}},
    "step denoiser": {"scheduler": SCHEDULER | {"prediction_type": "previous_sample"}},
    "classes": {"unet": UNET | {"num_class_embeds": 10}},
}


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_examples_are_python_and_import_what_they_should(tmp_path: Path, parts: dict[str, Any]):
    card = card_of(tmp_path, **parts)
    *stock, ours = snippets(card)
    assert all(imported(code) <= {"diffusers", "torch"} for code in stock)
    assert imported(ours) == {"hf_ddpm", "torch"}
    assert '"me/photos"' in ours
    assert_no_trace_of_absence(card)


def test_examples_fit_the_model(tmp_path: Path):
    codes = {name: snippets(card_of(tmp_path, **parts)) for name, parts in VARIANTS.items()}
    assert [len(code) for code in codes.values()] == [3, 3, 2, 1, 1]
    assert "num_inference_steps=500" in codes["plain"][0]
    assert "num_inference_steps" not in codes["T=1000"][0]
    assert "num_inference_steps=500" in codes["step denoiser"][0]
    assert "class_labels=[i % 10 for i in range(16)]" in codes["classes"][0]
    assert "cannot sample it" in card_of(tmp_path, **VARIANTS["step denoiser"])
    learned = SCHEDULER | {"variance_type": "learned_range"}
    assert len(snippets(card_of(tmp_path, scheduler=learned))) == 3
    assert len(snippets(card_of(tmp_path, scheduler=learned, unet=UNET | {"in_channels": 1}))) == 2


@pytest.fixture
def one_thread():
    """A network this small is a hundred times slower when its threads wait for cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
def test_all_examples_run(tmp_path: Path, one_thread: None):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, 1, 1, norm_num_groups=4, layers_per_block=1, add_attention=False, **blocks)
    scheduler = DDPMScheduler(
        30, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    card = write_card(tmp_path, str(tmp_path)).read_text(encoding="utf-8")
    codes = snippets(card)
    assert len(codes) == 3
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 16
    assert names["trajectory"][0].x_0_hat.shape == (16, 1, 8, 8)


def test_a_token_is_not_on_the_card(tmp_path: Path):
    assert TOKEN not in card_of(tmp_path, config=CONFIG | {"hub_token": TOKEN, "api_key": TOKEN})


HAND_WRITTEN = """---
license: mit
tags:
- mine
model-index:
- name: theirs
  results:
  - task:
      type: unconditional-image-generation
    dataset:
      type: cifar10
      name: CIFAR-10
    metrics:
    - type: fid
      value: 3.17
---

# Clothes

I made this on a rainy day.
"""


def test_a_readme_that_somebody_wrote_keeps_all_of_it(tmp_path: Path):
    make_run(tmp_path)
    (tmp_path / "README.md").write_text(HAND_WRITTEN, encoding="utf-8")
    for _ in range(2):  # the second time our part is replaced
        found = ModelCard.load(write_card(tmp_path))
        assert found.text.startswith(HAND_WRITTEN.partition("---\n\n")[2], 1)
        assert found.text.count(cards.BEGIN) == found.text.count(cards.END) == 1
        assert "## How to use it" in found.text
        assert found.data.license == "mit"
        assert found.data.tags[0] == "mine"
        assert "hf_ddpm" in found.data.tags
        assert [r.metric_value for r in found.data.eval_results] == [3.17]
        assert own_text(str(found)) == "# Clothes\n\nI made this on a rainy day."


def test_what_stands_around_our_part_stays(tmp_path: Path):
    path = write_card(make_run(tmp_path))
    text = path.read_text(encoding="utf-8").replace(cards.BEGIN, f"Above.\n{cards.BEGIN}") + "\nBelow.\n"
    path.write_text(text.replace("## How to use it", "## Something old"), encoding="utf-8")
    write_card(tmp_path)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("lost", [cards.BEGIN, cards.END])
def test_a_line_that_was_deleted_comes_back_and_the_card_does_not_grow(tmp_path: Path, lost: str):
    path = write_card(make_run(tmp_path))
    path.write_text(path.read_text(encoding="utf-8").replace(lost, ""), encoding="utf-8")
    lengths = [len(write_card(tmp_path).read_text(encoding="utf-8")) for _ in range(3)]
    assert lengths[1] == lengths[0] == lengths[2]
    assert path.read_text(encoding="utf-8").count(lost) == 1


def test_what_the_run_knows_of_data_and_origin_is_renewed(tmp_path: Path):
    make_run(tmp_path, config=CONFIG | {"init_from": "me/base"})
    (tmp_path / "README.md").write_text(HAND_WRITTEN.replace("tags:", "base_model: other/base\ntags:"), "utf-8")
    assert ModelCard.load(write_card(tmp_path)).data.base_model == "me/base"


def test_results_of_ours_are_replaced_and_others_stay(tmp_path: Path):
    make_run(tmp_path)
    (tmp_path / "README.md").write_text(HAND_WRITTEN, encoding="utf-8")
    evaluated(tmp_path, RESULT)
    write_card(tmp_path)
    evaluated(tmp_path, RESULT | {"value": 0.5})
    found = ModelCard.load(write_card(tmp_path)).data
    assert [r.metric_value for r in found.eval_results] == [3.17, 0.5]
    assert found.model_name == "theirs"


def test_a_revision_is_in_the_examples(tmp_path: Path):
    text = write_card(make_run(tmp_path), "me/photos", "std-0.1").read_text(encoding="utf-8")
    assert all('from_pretrained("me/photos", revision="std-0.1")' in code for code in snippets(text))
    assert "This is its revision `std-0.1`." in text
    assert cards.named_repository(text) == "me/photos"


def test_a_model_that_was_trained_further_says_of_what(tmp_path: Path):
    text = card_of(tmp_path, config=CONFIG | {"init_from": "google/ddpm-cifar10-32"})
    assert "began with the weights of [google/ddpm-cifar10-32]" in text
    assert ModelCard(text).data.base_model == "google/ddpm-cifar10-32"
    other = card_of(tmp_path / "other", config=CONFIG | {"init_from": "/models/mine"})
    assert ModelCard(other).data.base_model is None


def test_curves_of_quality_are_on_the_card(tmp_path: Path):
    text = card_of(tmp_path, figures=("kid.png", "val_loss.png"), config=CONFIG | {"eval_num_images": 1234})
    assert "(figures/kid.png)" in text
    assert "(figures/val_loss.png)" in text
    assert "on features of efficientnet-lite0 of 1,234 samples" in text


RESULT = {
    "metric": "kid",
    "name": "KID",
    "value": 0.0123456789,
    "standard_error": 0.00123,
    "num_compared": [5000, 10000],
    "floor": {"value": 0.0001, "standard_error": None, "num_compared": [4000, 4000], "of": "test against train"},
    "network": {"network": "inception", "input_size": 299, "weights_sha256": "cd" * 32},
    "reference": {"name": "some|one", "config": None, "split": "train", "count": 60000, "fingerprint": "ef" * 32},
    "sampling": {"scheduler": "ddim", "num_inference_steps": 50, "seed": 7},
    "command": "hf-ddpm evaluate photos",
}
COPIES = RESULT | {"metric": "memorization_pixels", "name": "Near", "remark": "so many"}


def evaluated(folder: Path, *results: dict[str, Any], weights: str = "") -> None:
    (folder / "evaluation.json").write_text(json.dumps({"weights_sha256": weights, "results": results}))


def test_no_evaluation_is_claimed_until_there_is_one(tmp_path: Path):
    none, copies = "No quality metric has been measured", "repeats images of its training data has not been measured"
    card = card_of(tmp_path)
    assert none in card
    assert copies in card
    for content in ("{}", '{"results": []}'):
        (tmp_path / "evaluation.json").write_text(content)
        assert card_of(tmp_path) == card
    evaluated(tmp_path, RESULT)
    assert none not in card_of(tmp_path)
    assert copies in card_of(tmp_path)
    evaluated(tmp_path, COPIES)
    assert none not in card_of(tmp_path)
    assert copies not in card_of(tmp_path)


def test_results_are_on_the_card_and_in_its_metadata(tmp_path: Path):
    other = COPIES | {"command": "hf-ddpm evaluate photos --seed 1", "floor": None, "standard_error": None}
    make_run(tmp_path)
    evaluated(tmp_path, RESULT, other)
    (tmp_path / "figures" / "steps.png").write_bytes(b"")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    row = "| KID | 0.0123 ± 0.0012 | 0.0001 (test against train, 4,000 against 4,000) | 5,000 against 10,000 |"
    assert f"{row} inception, 299 px | some\\|one, train, 60,000 | ddim, 50 steps | 7 |\n" in card
    assert "| Near | 0.01235 |  | 5,000 against 10,000 |" in card
    for text in ("- Near: so many\n", f"```bash\n{other['command']}\n```", "(figures/steps.png)"):
        assert text in card
    assert "(figures/seconds.png)" not in card
    assert_no_trace_of_absence(card)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results is not None
    assert [r.metric_value for r in results] == [RESULT["value"]] * 2
    assert results[0].metric_args == {
        "num_compared": [5000, 10000],
        "standard_error": 0.00123,
        "real_images": 0.0001,
        "reference_sha256": "ef" * 32,
        "network": "inception",
        "network_sha256": "cd" * 32,
        "scheduler": "ddim",
        "num_inference_steps": 50,
        "seed": 7,
    }
    assert (results[0].task_type, results[0].dataset_split, results[0].verified) == (
        "unconditional-image-generation",
        "train",
        False,
    )


def test_neighbors_are_said(tmp_path: Path):
    evaluated(make_run(tmp_path), RESULT | {"metric": "recall", "name": "Recall", "neighbors": 5})
    assert "| Recall, k = 5 | " in write_card(tmp_path).read_text(encoding="utf-8")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results is not None
    assert results[0].metric_args["neighbors"] == 5


@pytest.mark.parametrize(
    ("name", "type"),
    [("me/photos", "me/photos"), ("photos.v2", "photos.v2"), ("my photos", "my-photos-01234567"), ("é", "-01234567")],
)
def test_the_hub_takes_the_type_of_any_data_set(name: str, type: str):
    assert cards._dataset_type(name, "0123456789ab") == type


def test_results_of_several_data_sets_come_back_as_they_were(tmp_path: Path):
    test = RESULT["reference"] | {"split": "test"}
    evaluated(make_run(tmp_path), RESULT, RESULT | {"reference": test}, COPIES)
    write_card(tmp_path)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert results == cards._eval_results(cards.read_evaluation(tmp_path))
    assert results is not None
    assert [r.dataset_split for r in results] == ["train", "train", "test"]


def test_weights_take_their_results_with_them(tmp_path: Path):
    make_run(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"weights")
    evaluated(tmp_path, RESULT, weights=hashlib.sha256(b"weights").hexdigest())
    assert "KID" in write_card(tmp_path).read_text(encoding="utf-8").split("## Evaluation")[1]
    file.write_bytes(b"others")
    assert cards.read_evaluation(tmp_path) == []
    (tmp_path / "figures" / "bound.png").write_bytes(b"")
    card = write_card(tmp_path).read_text(encoding="utf-8")
    assert "## Evaluation" not in card
    assert "bound.png" not in card
    assert "eval_results" not in ModelCard(card).data.to_dict()


def test_weights_are_known_by_their_content(tmp_path: Path):
    assert weights_sha256(tmp_path) is None
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"ab")
    (tmp_path / "optimizer.bin").write_bytes(b"x")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"ab").hexdigest()
    (tmp_path / "unet").mkdir()
    for i, part in enumerate((b"c", b"d")):
        (tmp_path / "unet" / f"diffusion_pytorch_model-{i}-of-2.safetensors").write_bytes(part)
    assert weights_sha256(tmp_path) == hashlib.sha256(b"cd").hexdigest()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.2345678, 0.0123, "1.235 ± 0.012"),
        (12345.678, 21.0, "12,346 ± 21"),
        (-3.6e-5, 9.8e-5, "-0.000036 ± 0.000098"),
        (0.123456, None, "0.1235"),
        (0.123456, 0.0, "0.1235"),
        (None, None, "not finite"),
    ],
)
def test_values_have_as_many_digits_as_are_known(value: float | None, error: float | None, text: str):
    assert cards._measured(value, error) == text


def test_a_loss_that_is_no_number_is_not_passed_over(tmp_path: Path):
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
def test_what_somebody_wrote_into_a_file_is_said_to_be_wrong(tmp_path: Path, name: str, text: str):
    folder = make_run(tmp_path)
    (folder / name).write_text(text)
    said = {"README.md": r"README\.md cannot be read: ", "run.json": r"run\.json cannot be read: it must be a mapping"}
    with pytest.raises(UsageError, match=said.get(name, "the card cannot be written: ") + ".*: correct "):
        write_card(folder)


def test_text_cannot_break_a_table(tmp_path: Path):
    card = card_of(tmp_path, run={"training": {"device": "a|b\nc"}, "data": {"class_names": ["x|y"] * 30}})
    assert r"| Device | a\|b c |" in card
    assert r"| Classes | 30: x\|y, " in card
    assert_no_trace_of_absence(card)


def test_the_template_is_found_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model_card").mkdir()
    (tmp_path / "model_card" / "template.md").write_text("packaged")
    assert "{{ card_data }}" in cards._template()
    monkeypatch.setattr(cards.resources, "files", lambda package: tmp_path)
    assert cards._template() == "packaged"
