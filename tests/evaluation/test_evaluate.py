"""hf_ddpm.evaluation.evaluate: what is measured is written whole, beside what real images get, or refused in time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.data.batches import center_pixels, epoch_order
from hf_ddpm.data.cache import load_images
from hf_ddpm.evaluation import evaluate as module
from hf_ddpm.evaluation import results as results_module
from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.features import NETWORKS, load_network
from hf_ddpm.evaluation.job import _choose_classes
from hf_ddpm.evaluation.measure import measure_distances
from hf_ddpm.evaluation.results import write_evaluation
from hf_ddpm.evaluation.statistics import collect, make_reference
from hf_ddpm.hub import card as cards
from hf_ddpm.hub.card_metadata import eval_results
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import sha256, weights_sha256
from hf_ddpm.sampling.sampler import iter_samples, load_for_sampling
from hf_ddpm.timesteps import SearchedTimesteps, write_searched
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from tests.support.networks import tiny_unet_config

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


class CallOfInception(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = self.conv(img.to(torch.float32) / 128 - 1).relu().mean(dim=[2, 3])
        return x if return_features else x.softmax(dim=1)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "inception.pt"
    torch.manual_seed(0)
    torch.jit.script(CallOfInception()).save(str(path))
    return path


@pytest.fixture(autouse=True)
def known_network(network_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network with the call of Inception, 8 features, in its place."""
    monkeypatch.setitem(NETWORKS, "inception", replace(NETWORKS["inception"], sha256=sha256(network_file)))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with 300 digits of `train` and 120 of `test`."""
    root = tmp_path_factory.mktemp("data")
    images = load_images(TrainingConfig(dataset_name="digits", cache_dir=str(root / "cache")))
    for i in range(420):
        folder = root / "digits" / ("train" if i < 300 else "test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.image(i)[0]).save(folder / f"{i:04}.png")
    return root / "digits"


def config_of(digits: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig(dataset_name=str(digits), cache_dir=str(digits.parent / "cache"), **settings)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """What stock diffusers writes, and nothing else."""
    torch.manual_seed(0)
    unet = UNet2DModel(**tiny_unet_config(channels=1))
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
    scheduler = DDPMScheduler(
        20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def run(stock: Path, digits: Path) -> Path:
    """The same in the folder of a run of ours."""
    folder = stock.with_name("run")
    shutil.copytree(stock, folder)
    config = config_of(digits)
    save_config(config, folder / "config.yaml")
    data = {"name": "digits", "fingerprint": load_images(config).fingerprint}
    (folder / "run.json").write_text(json.dumps({"data": data}))
    cards.write_card(folder)
    return folder


@pytest.fixture
def measure(network_file: Path) -> Any:
    """`evaluate` with few images and steps."""

    def measure(model: Path, **settings: Any) -> dict[str, Any]:
        small = {"num_images": 40, "num_inference_steps": [2], "batch_size": 16, "device": "cpu"}
        if not {"network", "network_path"} & settings.keys():
            small["network_path"] = network_file
        return evaluate(model, **(small | settings))

    return measure


def results_in(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "evaluation.json").read_text())["results"]


def by_metric(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in results}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


DISTANCES = {"fd", "kid", "precision", "recall", "density", "coverage"}
ALL = ("fd", "kid", "precision", "nll", "memorization")


def test_all_metrics_of_a_run(run: Path, measure: Any, digits: Path, network_file: Path):
    done = measure(run, metrics=ALL)
    assert done["results"] == results_in(run)
    rows = by_metric(done["results"])
    assert set(rows) == DISTANCES | {"nll", "memorization_pixels", "memorization_features"}
    assert done["card"] == run / "README.md"
    assert {p.name for p in (run / "figures").iterdir()} == {"bound.png", "memorization.png"}

    # The same by hand.
    network = load_network("inception", network_file)
    pipeline, steps = load_for_sampling(str(run), num_inference_steps=2, device="cpu")
    samples = [images for _, images in iter_samples(pipeline, range(40), batch_size=16, num_inference_steps=steps)]
    X = network(torch.cat(samples))
    real = {
        split: network(torch.from_numpy(center_pixels(load_images(config_of(digits / split))).copy()))
        for split in ("train", "test")
    }
    for metric, row in rows.items():
        if metric in DISTANCES:
            assert row["reference"]["split"] == "train"
            assert row["num_compared"] == row["floor"]["num_compared"] == [40, 300]
            assert row["floor"]["of"] == "test against train"
    assert rows["fd"]["name"] == "FID"
    assert rows["fd"]["value"] == pytest.approx(frechet_distance(Moments.of(X), Moments.of(real["train"])), rel=1e-6)
    kid = kernel_distance(X, real["train"])
    assert (rows["kid"]["value"], rows["kid"]["standard_error"]) == pytest.approx(tuple(kid), rel=1e-6)
    order = epoch_order(0, 0, 120)[:40]  # that of the reference of `test`
    floor = kernel_distance(real["test"][order], real["train"])
    assert rows["kid"]["floor"]["value"] == pytest.approx(floor.distance, rel=1e-6)
    assert abs(rows["kid"]["floor"]["value"]) < 4 * rows["kid"]["floor"]["standard_error"]
    assert rows["kid"]["value"] > 10 * rows["kid"]["standard_error"]
    assert rows["kid"]["sampling"]["network_evaluations"] == 2
    assert rows["kid"]["sampling"]["seconds_per_image"] > 0

    assert rows["nll"]["num_compared"] == [40]
    assert (rows["nll"]["reference"]["split"], rows["nll"]["reference"]["count"]) == ("test", 120)
    assert rows["nll"]["value"] > rows["nll"]["likelihood"]["decoder"] > 0
    copies = rows["memorization_pixels"]
    assert copies["num_compared"] == [40, 300]
    assert copies["floor"]["value"] == pytest.approx(1 / 121)
    assert copies["held_out"]["split"] == "test"


def test_the_card_gives_its_results_back(run: Path, measure: Any):
    measure(run, metrics=ALL, num_inference_steps=[1, 3], schedulers=["ddpm", "unipc"])
    card = ModelCard.load(run / "README.md")
    results = results_in(run)
    found = card.data.eval_results
    assert found == eval_results(results)
    assert len(found) == len(results) == 4 * 6 + 3
    assert {(r.metric_type, r.metric_value) for r in found} == {(row["metric"], row["value"]) for row in results}
    assert card.data.model_name == "run"
    for row in results:
        for text in cards.result_cells(row).values():
            assert text in card.text
    assert f"```bash\n{results[0]['command']}\n```" in card.text
    for name in ("steps.png", "seconds.png", "bound.png", "memorization.png"):
        assert f"(figures/{name})" in card.text
    # Where things lie is nobody's business.
    assert str(run.parent) not in card.content + json.dumps(results)


@pytest.mark.parametrize("steps", ["5,many", "2.5", "-5"])
def test_steps_that_are_no_numbers_are_said_with_their_option(run: Path, steps: str):
    done = CliRunner().invoke(app, ["evaluate", str(run), "--metrics", "kid", "--num_inference_steps", steps])
    assert done.exit_code == 2
    assert f"num_inference_steps must be whole numbers, got {steps!r}" in done.output


def test_a_grid_is_of_the_same_noises(run: Path, measure: Any):
    measure(run, metrics=["kid"], num_inference_steps=[1, 2, 5], schedulers=["ddim", "dpmsolver++"])
    grid = results_in(run)
    cells = [(r["sampling"]["scheduler"], r["sampling"]["num_inference_steps"]) for r in grid]
    assert cells == [(name, n) for name in ("ddim", "dpmsolver++") for n in (1, 2, 5)]
    assert [r["sampling"]["network_evaluations"] for r in grid] == [1, 2, 5] * 2
    found = [r["value"] for r in grid]
    # One step of either is the same, and so are two, of which the first and the last are of first order.
    assert found[:2] == found[3:5]
    assert len(set(found)) == 4
    pictures = [(run / "figures" / name).read_bytes() for name in ("steps.png", "seconds.png")]
    assert pictures[0] != pictures[1]
    (again,) = measure(run, metrics=["kid"], num_inference_steps=[5], schedulers=["ddim"])["results"]
    assert again["value"] == grid[2]["value"]


def test_defaults_are_those_of_sampling(run: Path, measure: Any):
    (row,) = measure(run, metrics=["kid"], num_inference_steps=[])["results"]
    assert (row["sampling"]["scheduler"], row["sampling"]["num_inference_steps"]) == ("unipc", 20)


def test_the_command_says_no_solver_where_the_default_goes_by_steps(run: Path, measure: Any):
    found = SearchedTimesteps("dpmsolver++", (19, 12, 4), 0.1, 0.2, num_images=1, seed=0, reference_steps=10)
    write_searched(run, [found], weights_sha256(run))
    rows = measure(run, metrics=["kid"], num_inference_steps=[3, 4])["results"]
    cells = [(row["sampling"]["scheduler"], row["sampling"]["num_inference_steps"]) for row in rows]
    assert cells == [("dpmsolver++", 3), ("unipc", 4)]
    assert "--num_inference_steps 3,4" in rows[0]["command"]
    assert "--scheduler" not in rows[0]["command"]
    (row,) = measure(run, metrics=["kid"], num_inference_steps=[4])["results"]
    assert "--scheduler unipc" in row["command"]


def test_the_command_names_solvers_and_no_steps_where_each_has_its_own(run: Path, measure: Any):
    DDPMScheduler(30, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(
        run / "scheduler"
    )
    rows = measure(run, metrics=["kid"], schedulers=["ddpm", "unipc"], num_inference_steps=[])["results"]
    cells = [(row["sampling"]["scheduler"], row["sampling"]["num_inference_steps"]) for row in rows]
    assert cells == [("ddpm", 30), ("unipc", 20)]
    assert "--scheduler ddpm,unipc" in rows[0]["command"]
    assert "--num_inference_steps" not in rows[0]["command"]


def test_dtype_and_compilation_are_of_samples_and_not_of_the_likelihood(
    run: Path, measure: Any, monkeypatch: pytest.MonkeyPatch
):
    metrics, wrapped = ["kid", "nll"], []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: wrapped.append(function) or function)
    exact = by_metric(measure(run, metrics=metrics)["results"])
    assert (exact["kid"]["sampling"]["dtype"], exact["kid"]["sampling"]["compile"]) == ("fp32", False)
    assert "--dtype" not in exact["kid"]["command"]
    assert "--compile" not in exact["kid"]["command"]
    assert cards.result_cells(exact["kid"])["By"] == "unipc, 2 steps"
    assert not wrapped

    near = by_metric(measure(run, metrics=metrics, dtype="bf16")["results"])
    assert (near["kid"]["sampling"]["dtype"], near["kid"]["sampling"]["compile"]) == ("bf16", False)
    assert "--dtype bf16" in near["kid"]["command"]
    assert cards.result_cells(near["kid"])["By"] == "unipc, 2 steps, bf16"
    assert near["kid"]["value"] != exact["kid"]["value"]
    assert near["nll"]["value"] == exact["nll"]["value"]
    assert near["nll"]["likelihood"] == exact["nll"]["likelihood"]

    compiled = by_metric(measure(run, metrics=metrics, compile=True)["results"])
    assert compiled["kid"]["sampling"]["compile"] is True
    assert compiled["kid"]["command"].endswith(" --compile")
    assert compiled["kid"]["sampling"]["network_evaluations"] == 2
    assert len(wrapped) == 1
    assert [row["value"] for row in compiled.values()] == [row["value"] for row in exact.values()]
    # The likelihood is the same result each time, the distances are three.
    assert results_in(run) == [exact["kid"], near["kid"], *compiled.values()]


def test_results_that_do_not_say_their_dtype_are_of_fp32(run: Path, measure: Any):
    (row,) = measure(run, metrics=["kid"])["results"]
    content = json.loads((run / "evaluation.json").read_text())
    for name in ("dtype", "compile"):
        del content["results"][0]["sampling"][name]
    (run / "evaluation.json").write_text(json.dumps(content))
    assert cards.result_cells(content["results"][0]) == cards.result_cells(row)
    measure(run, metrics=["kid"], dtype="bf16")
    assert [r["sampling"].get("dtype") for r in results_in(run)] == [None, "bf16"]
    measure(run, metrics=["kid"])
    assert [r["sampling"]["dtype"] for r in results_in(run)] == ["bf16", "fp32"]


def run_process(rank: int, size: int, port: int, out: Path, model: Path, network_file: Path) -> None:
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = f"{port}"
    done = evaluate(
        model,
        metrics=ALL,
        num_images=70,
        num_inference_steps=[2],
        batch_size=16,
        device="cpu",
        network_path=network_file,
        out=out,
    )
    (out / f"{rank}.json").write_text(json.dumps(done["results"]))


def test_any_batch_size_measures_the_same(run: Path, measure: Any, tmp_path: Path):
    found = [
        [row["value"] for row in measure(run, metrics=ALL[:-1], batch_size=size, out=tmp_path / f"{size}")["results"]]
        for size in (3, 64)
    ]
    assert found[0] == found[1]


def test_any_number_of_processes_writes_the_same(run: Path, tmp_path: Path, network_file: Path):
    found = []
    for size in (1, 2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"{size}"
        # Forked, they have the small network in Inception's place.
        context = multiprocessing.get_context("fork")
        children = [
            context.Process(target=run_process, args=(rank, size, port, out, run, network_file))
            for rank in range(size)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * size
        for rank in range(size):
            assert json.loads((out / f"{rank}.json").read_text()) == results_in(out)
        results = results_in(out)
        for row in results:
            if "sampling" in row:
                assert row["sampling"].pop("num_processes") == size
                del row["sampling"]["seconds_per_image"]
            del row["command"]
        found.append((results, (out / "figures" / "memorization.png").read_bytes()))
    assert found[0] == found[1] == found[2]


def test_a_stock_repository(stock: Path, measure: Any, digits: Path, network_file: Path, tmp_path: Path):
    before = files_in(stock)
    for split in ("train", "test"):
        make_reference(config_of(digits), split, load_network("inception", network_file), tmp_path / split)
    paths = {"reference": tmp_path / "train", "floor": tmp_path / "test"}
    done = measure(stock, **paths, out=tmp_path / "out")
    assert files_in(stock) == before
    assert set(by_metric(done["results"])) == DISTANCES
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "evaluation.json"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert len(card.data.eval_results) == 6
    command = results_in(tmp_path / "out")[0]["command"]
    assert "evaluate stock --metrics fd,kid,precision --reference train --floor test" in command
    # The same with the data instead of a reference, and into the model's own folder.
    again = measure(stock, data=config_of(digits))
    assert [row["value"] for row in again["results"]] == [row["value"] for row in done["results"]]
    assert [row["floor"]["value"] for row in again["results"]] == [row["floor"]["value"] for row in done["results"]]
    assert files_in(stock).keys() - before.keys() == {"README.md", "evaluation.json"}
    # Halves, without another split.
    (row,) = measure(stock, metrics=["kid"], reference=tmp_path / "train")["results"]
    assert (row["floor"]["of"], row["floor"]["num_compared"]) == ("halves of train", [40, 150])


def test_what_somebody_wrote_on_the_card_stays(run: Path, measure: Any):
    (run / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    measure(run, metrics=["kid"])
    card = ModelCard.load(run / "README.md")
    assert card.text.startswith("Mine.\n")
    assert card.data.license == "mit"
    assert [result.metric_value for result in card.data.eval_results] == [results_in(run)[0]["value"]]


def test_a_card_keeps_the_repository_that_it_names(run: Path, measure: Any):
    cards.write_card(run, "me/photos")
    measure(run, metrics=["kid"])
    assert cards.named_repository((run / "README.md").read_text(encoding="utf-8")) == "me/photos"


def test_results_replace_those_of_the_same_kind_only(run: Path, measure: Any):
    first = measure(run, metrics=["kid", "nll"])["results"]
    measure(run, metrics=["kid"], num_inference_steps=[3])
    measure(run, metrics=["kid"], seed=1)
    kept = [results_in(run)[i] for i in (0, 2, 3)]
    again = measure(run, metrics=["kid"])["results"]
    assert [row["value"] for row in again] == [first[1]["value"]]
    assert results_in(run) == [*kept, *again]
    assert cards.read_evaluation(run) == results_in(run)


def test_numbers_belong_to_the_weights_that_they_were_measured_on(run: Path, measure: Any):
    measure(run, metrics=["kid", "nll"])
    assert "Bits per dimension" in (run / "README.md").read_text()
    pipeline = DDPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.5)
    pipeline.save_pretrained(run)
    assert cards.read_evaluation(run) == []
    cards.write_card(run)
    text = (run / "README.md").read_text()
    assert "Bits per dimension" not in text
    assert "figures/bound.png" not in text
    (row,) = measure(run, metrics=["kid"])["results"]
    assert results_in(run) == [row]
    assert not (run / "figures" / "bound.png").exists()
    assert "KID" in (run / "README.md").read_text()


def not_reached(*_: Any, **__: Any) -> Any:
    raise AssertionError("sampled before it was checked")


def test_the_card_of_results_elsewhere_keeps_the_name_that_it_has(run: Path, measure: Any):
    out = run.with_name("results")
    out.mkdir()
    cards.write_card(out, "me/photos")
    measure(run, metrics=["kid"], out=out)
    assert 'from_pretrained("me/photos")' in (out / "README.md").read_text()


def test_neighbors_decide_and_are_recorded(run: Path, measure: Any, digits: Path):
    rows = by_metric(measure(run, metrics=["precision"])["results"])
    assert {row["neighbors"] for row in rows.values()} == {5}
    old = results_in(run)
    for row in old:
        del row["neighbors"]  # as of before they were recorded
    content = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(content | {"results": old}))
    measure(run, metrics=["precision"])
    assert len(results_in(run)) == len(rows)


def test_times_of_different_machines_are_in_no_picture(run: Path, measure: Any):
    measure(run, metrics=["kid"], num_inference_steps=[2])
    content = json.loads((run / "evaluation.json").read_text())
    content["results"][0]["sampling"]["device"] = "another"
    (run / "evaluation.json").write_text(json.dumps(content))
    measure(run, metrics=["kid"], num_inference_steps=[3])
    assert (run / "figures/steps.png").is_file()
    assert not (run / "figures/seconds.png").exists()
    measure(run, metrics=["kid"], num_inference_steps=[4])
    assert (run / "figures/seconds.png").is_file()
    content = json.loads((run / "evaluation.json").read_text())
    for row in content["results"]:
        row["sampling"]["device"] = "another"
    (run / "evaluation.json").write_text(json.dumps(content))
    measure(run, metrics=["kid"], num_inference_steps=[4])
    assert not (run / "figures/seconds.png").exists()


def test_a_folder_for_results_keeps_those_of_another_model(run: Path, stock: Path, measure: Any, digits: Path):
    out = run.with_name("elsewhere") / "results"
    measure(run, metrics=["kid"], out=out)
    assert "--out results" in results_in(out)[0]["command"]
    assert 'from_pretrained("run")' in (out / "README.md").read_text()
    unet = UNet2DModel.from_pretrained(stock / "unet")
    with torch.no_grad():
        unet.conv_out.weight *= 2
    unet.save_pretrained(stock / "unet")
    before = files_in(out)
    with pytest.raises(UsageError, match="out must not hold what was measured of other weights"):
        measure(stock, metrics=["kid"], data=config_of(digits), out=out)
    assert files_in(out) == before


def test_mirrored_images_count_as_trained_on_whatever_names_the_data(run: Path, measure: Any, digits: Path):
    save_config(config_of(digits, random_flip=True), run / "config.yaml")
    rows = measure(run, metrics=["memorization"], data=config_of(digits))["results"]
    assert all(row["memorization"]["mirrored"] for row in rows)
    assert rows[0]["num_compared"][1] == 600


def test_a_reference_has_the_name_that_its_data_have_now(run: Path, measure: Any, digits: Path, tmp_path: Path):
    measure(run, metrics=["kid"])
    shutil.copytree(digits, tmp_path / "renamed")
    data = replace(config_of(digits), dataset_name=str(tmp_path / "renamed"))
    measure(run, metrics=["kid"], data=data)
    assert [row["reference"]["name"] for row in results_in(run)] == ["renamed"]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"metrics": ["fid"]}, "metrics must be of fd, kid, cmmd, precision, nll, memorization, got fid"),
    "no metric": ({"metrics": []}, "got none"),
    "scheduler": ({"schedulers": ["euler"]}, "scheduler must be one of ddpm, ddim, .*, got 'euler'"),
    "dtype": ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
    "steps": ({"num_inference_steps": [2, 21]}, r"num_inference_steps must be in \[1, 20\], got 21"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "too few for fd": ({"num_images": 8}, "8 images are not more than the 8 dimensions of inception"),
    "too few for kid": ({"metrics": ["kid"], "num_images": 3}, "num_images must be at least 4 for kid, got 3"),
    "too few for precision": ({"metrics": ["precision"], "num_images": 5}, "at least 6 for precision, got 5"),
    "too few copies": ({"metrics": ["memorization"], "num_images": 19}, "at least 20 for memorization, got 19"),
    "network": ({"network": "vgg"}, "network must be one of"),
    "network file": ({"network_path": "nowhere.pt"}, "network_path must be the weights file of inception"),
    "cmmd": ({"metrics": ["cmmd"]}, "cmmd is of CLIP's embeddings, got the network 'inception'"),
    "reference": ({"reference": "nowhere"}, "make one with `hf-ddpm reference`"),
    "floor": ({"floor": "nowhere"}, "floor goes with a reference"),
    "device": ({"device": "abacus"}, "device must be one that torch finds here, as cpu, got 'abacus'"),
    "split": ({"split": "validation"}, "^split must be .*got 'validation'"),
    "test split": ({"metrics": ["nll"], "test_split": "validation"}, "^test_split must be .*got 'validation'"),
    "terms": ({"metrics": ["nll"], "timesteps_per_image": 1}, r"timesteps_per_image must be in \[2, 20\]"),
    "held-out are training": (
        {"metrics": ["memorization"], "test_split": "train"},
        "held-out images must not be training images, got 300 of 300",
    ),
    "resolution": ({"data": TrainingConfig(dataset_name="digits", resolution=9)}, "resolution must be the model's, 8"),
    "no test split": (
        {"metrics": ["nll"], "data": TrainingConfig(dataset_name="digits")},
        "^test_split must be train, which is all that digits has",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_measured_is_refused_before_sampling(
    run: Path, measure: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(module, "sample_statistics", not_reached)
    monkeypatch.setattr(module, "measure_likelihood", not_reached)
    before = files_in(run)
    settings, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        measure(run, **settings)
    assert files_in(run) == before


def test_a_folder_that_cannot_be_evaluated_is_refused(
    run: Path,
    stock: Path,
    of_classes: Path,
    measure: Any,
    monkeypatch: pytest.MonkeyPatch,
    digits: Path,
    tmp_path: Path,
):
    monkeypatch.setattr(module, "sample_statistics", not_reached)
    monkeypatch.setattr(module, "measure_likelihood", not_reached)
    for model, settings, message in (
        (tmp_path, {}, "must be a folder with model_index.json"),
        (tmp_path / "not" / "there", {}, "must be a folder with model_index.json"),
        ("me/photos", {}, "must be a folder or on the Hub, got 'me/photos'"),
        (stock, {}, "the data must be known for this"),
        (run, {"out": of_classes}, "out must not hold another model"),
        (run, {"out": run / "config.yaml"}, "out must be a folder to write to"),
    ):
        with pytest.raises(UsageError, match=message):
            measure(model, **settings)
    (stock / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["d", "UNet2D"]}')
    with pytest.raises(UsageError, match=r"must be a DDPMPipeline .* a StableDiffusionPipeline"):
        measure(stock)

    (run / "evaluation.json").write_text('{"format": 1, "results"')
    with pytest.raises(UsageError, match=r"evaluation\.json cannot be read: .*: move it away"):
        measure(run)
    (run / "evaluation.json").unlink()
    recorded = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({"data": {"fingerprint": "ab" * 32}}))
    with pytest.raises(UsageError, match="trained on, got images with the fingerprint") as caught:
        measure(run)
    assert "ab" * 32 in str(caught.value)
    assert recorded["data"]["fingerprint"] in str(caught.value)
    with torch.no_grad():
        pipeline = DDPMPipeline.from_pretrained(run)
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    pipeline.save_pretrained(run)
    with pytest.raises(UsageError, match="weights must be finite, got NaN or infinity in 1 of them, first conv_out"):
        measure(run, data=config_of(digits))


def test_references_of_another_kind_are_refused(
    run: Path, measure: Any, digits: Path, network_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "sample_statistics", not_reached)
    network = load_network("inception", network_file)
    for name, value in (("resolution", 4), ("channels", 3)):
        make_reference(config_of(digits, **{name: value}), "test", network, tmp_path / name)
        with pytest.raises(UsageError, match="they differ in") as caught:
            measure(run, reference=tmp_path / name)
        expected = [name, str(value), {"resolution": "8", "channels": "1"}[name]]
        assert [line.split() for line in str(caught.value).splitlines()][2] == expected
    few = tmp_path / "few"
    for i in range(8):
        (few / "train").mkdir(parents=True, exist_ok=True)
        shutil.copy(digits / "train" / f"{i:04}.png", few / "train")
    make_reference(config_of(few, resolution=8, channels=1), "train", network, tmp_path / "small")
    with pytest.raises(UsageError, match="the reference must be more for fd, got 8"):
        measure(run, reference=tmp_path / "small")


def test_samples_that_are_not_finite_leave_nothing_behind(run: Path, measure: Any):
    pipeline = DDPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.fill_(3e38)
    pipeline.save_pretrained(run)
    before = files_in(run)
    with pytest.raises(ValueError, match="samples must be finite, got NaN for seed 0"):
        measure(run)
    assert files_in(run) == before


def test_a_write_that_fails_leaves_what_was_there(run: Path, measure: Any, monkeypatch: pytest.MonkeyPatch):
    measure(run, metrics=["kid"])
    before = files_in(run)

    def full(path: Path, content: bytes | str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(results_module, "write_atomically", full)
    with pytest.raises(OSError, match="no space left"):
        measure(run, metrics=["kid"], seed=1)
    assert files_in(run) == before


def labeled_folder(root: Path, classes: dict[str, list[int]], digits: Path) -> Path:
    import datasets

    parts = {}
    names = datasets.ClassLabel(names=["even", "odd", "other"][: max(max(labels) for labels in classes.values()) + 1])
    for split, labels in classes.items():
        paths = sorted((digits / split).iterdir())[: len(labels)]
        data = datasets.Dataset.from_dict({"image": [str(p) for p in paths], "kind": labels})
        parts[split] = data.cast_column("image", datasets.Image()).cast_column("kind", names)
    datasets.DatasetDict(parts).save_to_disk(root)
    return root


@pytest.fixture
def of_classes(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(**tiny_unet_config(channels=1), num_class_embeds=2)
    DDPMPipeline(unet, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "classes")
    return tmp_path / "classes"


def test_classes_are_sampled_as_often_as_in_the_data(of_classes: Path, measure: Any, digits: Path, tmp_path: Path):
    data = labeled_folder(tmp_path / "labeled", {"train": [0, 0, 0, 1] * 25, "test": [0, 1] * 10}, digits)
    config = config_of(digits, label_column="kind")
    settings = {"data": replace(config, dataset_name=str(data))}
    done = measure(of_classes, metrics=["kid", "nll"], num_images=100, **settings)
    assert by_metric(done["results"])["kid"]["sampling"]["classes"] == "as in train"
    assert by_metric(done["results"])["nll"]["num_compared"] == [20]
    turn = measure(of_classes, metrics=["kid"], data=config_of(digits))["results"]
    assert turn[0]["sampling"]["classes"] == "each in turn"
    unet = SimpleNamespace(num_class_embeds=2)
    assert _choose_classes(unet, SimpleNamespace(has_labels=False), "train", 3, 5)[0] == [1, 0, 1]  # by seed
    with pytest.raises(UsageError, match="num_images must be at least 2, as many as classes"):
        measure(of_classes, metrics=["memorization"], data=config_of(digits), num_images=1)


def test_a_class_without_images_is_refused(of_classes: Path, measure: Any, digits: Path, tmp_path: Path):
    data = labeled_folder(tmp_path / "empty", {"train": [1] * 30, "test": [0, 1] * 10}, digits)
    config = replace(config_of(digits, label_column="kind"), dataset_name=str(data))
    with pytest.raises(UsageError, match="each class must have images in train, got none of 'even'"):
        measure(of_classes, metrics=["kid"], data=config)


def test_a_bound_that_is_not_finite_is_said(run: Path):
    row = {"metric": "nll", "name": "Bits per dimension", "value": None, "standard_error": None, "num_compared": [9]}
    row |= {"reference": {"name": "digits", "split": "test", "count": 9, "fingerprint": "ab"}, "command": "x"}
    row |= {"likelihood": {"timesteps_per_image": 20, "seed": 0}}
    write_evaluation(run, str(weights_sha256(run)), [row])
    card = ModelCard.load(run / "README.md")
    assert "| not finite |" in card.text
    assert card.data.eval_results is None


def blurred(pixels: torch.Tensor, passes: int) -> torch.Tensor:
    x = pixels.float()
    for _ in range(passes):
        x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x.round().to(torch.uint8)


def noisy(pixels: torch.Tensor, std: float) -> torch.Tensor:
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels.float() + std * noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", ["inception", "efficientnet-lite0"])
def test_distances_rise_with_noise_blur_and_classes_that_are_left_out(name: str, network_file: Path, tmp_path: Path):
    if name != "inception":
        pytest.importorskip("efficientnet_lite_pytorch", reason='needs pip install "hf_ddpm[evaluation]"')
    network = load_network(name, network_file if name == "inception" else None)
    cached = load_images(TrainingConfig(dataset_name="digits", label_column="label", cache_dir=str(tmp_path)))
    pixels, labels = torch.from_numpy(center_pixels(cached)[:400].copy()), torch.from_numpy(cached.labels[:400])
    reference, others, kinds = collect(network, [pixels[:200]]), pixels[200:], labels[200:]

    def distances(images: torch.Tensor) -> dict[str, float]:
        # A Fréchet distance needs more images than dimensions.
        metrics = ["kid", "precision"] + (["fd"] if network.dimensions < 100 else [])
        found = measure_distances(collect(network, [images]), reference, metrics)
        return {metric: row.value for metric, row in found.items()}

    floor = distances(others)
    for degrees in (
        [noisy(others, 15), noisy(others, 40), noisy(others, 100)],
        [blurred(others, 1), blurred(others, 2), blurred(others, 4)],
        [others[kinds < 6], others[kinds < 3], others[kinds < 1]],
    ):
        found = [floor, *map(distances, degrees)]
        for metric in {"kid", "fd"} & floor.keys():
            rising = [row[metric] for row in found]
            assert rising == sorted(rising), (metric, rising)
        assert found[-1]["coverage"] < floor["coverage"]
