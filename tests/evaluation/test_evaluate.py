"""Evaluation: each number is the one that is measured by hand, for any batch size and number of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from hf_ddpm.data.batches import epoch_order, fixed_pixels
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.evaluation.job import load_job
from hf_ddpm.evaluation.measure import measure_distances
from hf_ddpm.evaluation.request import Request
from hf_ddpm.evaluation.statistics import collect, make_reference
from hf_ddpm.hub import card as cards
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import save_config
from tests.support.evaluations import (
    ALL_METRICS,
    DISTANCES,
    by_metric,
    config_of,
    files_in,
    labeled_folder,
    results_in,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


@pytest.mark.slow
def test_evaluate_measures_all_metrics_of_a_run(run: Path, measure: Any, digits: Path, network_file: Path):
    done = measure(run, metrics=ALL_METRICS)
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
        split: network(torch.from_numpy(fixed_pixels(load_images(config_of(digits / split))).copy()))
        for split in ("train", "test")
    }
    for metric, row in rows.items():
        if metric in DISTANCES:
            assert row["reference"]["split"] == "train"
            assert row["num_compared"] == row["real_vs_real"]["num_compared"] == [40, 300]
            assert row["real_vs_real"]["of"] == "test against train"
    assert rows["fd"]["name"] == "FID"
    assert rows["fd"]["value"] == pytest.approx(frechet_distance(Moments.of(X), Moments.of(real["train"])), rel=1e-6)
    kid = kernel_distance(X, real["train"])
    assert (rows["kid"]["value"], rows["kid"]["standard_error"]) == pytest.approx(tuple(kid), rel=1e-6)
    order = epoch_order(0, 0, 120)[:40]  # that of the reference of `test`
    real_vs_real = kernel_distance(real["test"][order], real["train"])
    assert rows["kid"]["real_vs_real"]["value"] == pytest.approx(real_vs_real.distance, rel=1e-6)
    assert abs(rows["kid"]["real_vs_real"]["value"]) < 4 * rows["kid"]["real_vs_real"]["standard_error"]
    assert rows["kid"]["value"] > 10 * rows["kid"]["standard_error"]
    assert rows["kid"]["sampling"]["network_evaluations"] == 2
    assert rows["kid"]["sampling"]["seconds_per_image"] > 0

    assert rows["nll"]["num_compared"] == [40]
    assert (rows["nll"]["reference"]["split"], rows["nll"]["reference"]["count"]) == ("test", 120)
    assert rows["nll"]["value"] > rows["nll"]["likelihood"]["decoder"] > 0
    copies = rows["memorization_pixels"]
    assert copies["num_compared"] == [40, 300]
    assert copies["real_vs_real"]["value"] == pytest.approx(1 / 121)
    assert copies["held_out"]["split"] == "test"


@pytest.mark.slow
def test_evaluate_samples_the_same_noises_for_each_setting_of_a_grid(run: Path, measure: Any):
    measure(run, metrics=["kid"], num_inference_steps=[1, 2, 3], schedulers=["ddim", "dpmsolver++"])
    grid = results_in(run)
    settings = [(r["sampling"]["scheduler"], r["sampling"]["num_inference_steps"]) for r in grid]
    assert settings == [(name, n) for name in ("ddim", "dpmsolver++") for n in (1, 2, 3)]
    assert [r["sampling"]["network_evaluations"] for r in grid] == [1, 2, 3] * 2
    values = [r["value"] for r in grid]
    # One step of both is the same, and so are two: the first and the last step are always of first order.
    assert values[:2] == values[3:5]
    assert len(set(values)) == 4
    pictures = [(run / "figures" / name).read_bytes() for name in ("steps.png", "seconds.png")]
    assert pictures[0] != pictures[1]
    (again,) = measure(run, metrics=["kid"], num_inference_steps=[3], schedulers=["ddim"])["results"]
    assert again["value"] == grid[2]["value"]


@pytest.mark.slow
def test_evaluate_uses_the_default_scheduler_and_steps_of_sampling(run: Path, measure: Any):
    (row,) = measure(run, metrics=["kid"], num_inference_steps=[])["results"]
    assert (row["sampling"]["scheduler"], row["sampling"]["num_inference_steps"]) == ("unipc", 20)


@pytest.mark.slow
def test_dtype_and_compilation_apply_to_samples_and_not_to_the_likelihood(
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
    # The likelihood is one result, which each evaluation replaces; the distances are three results.
    assert results_in(run) == [exact["kid"], near["kid"], *compiled.values()]


def run_process(rank: int, size: int, port: int, out: Path, model: Path, network_file: Path) -> None:
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = f"{port}"
    done = evaluate(
        model,
        metrics=ALL_METRICS,
        num_images=70,
        num_inference_steps=[2],
        batch_size=16,
        device="cpu",
        network_path=network_file,
        out=out,
    )
    (out / f"{rank}.json").write_text(json.dumps(done["results"]))


@pytest.mark.slow
def test_evaluate_measures_the_same_with_any_batch_size(run: Path, measure: Any, tmp_path: Path):
    found = [
        [
            row["value"]
            for row in measure(run, metrics=ALL_METRICS[:-1], batch_size=size, out=tmp_path / f"{size}")["results"]
        ]
        for size in (3, 64)
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_evaluate_writes_the_same_in_any_number_of_processes(run: Path, tmp_path: Path, network_file: Path):
    found = []
    for size in (1, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"{size}"
        # Forked processes have the small network in the place of Inception, too.
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
    assert found[0] == found[1]


@pytest.mark.slow
def test_evaluate_measures_a_stock_repository_by_references_or_data(
    stock: Path, measure: Any, digits: Path, network_file: Path, tmp_path: Path
):
    before = files_in(stock)
    for split in ("train", "test"):
        make_reference(config_of(digits), split, load_network("inception", network_file), tmp_path / split)
    paths = {"reference": tmp_path / "train", "other_reference": tmp_path / "test"}
    done = measure(stock, **paths, out=tmp_path / "out")
    assert files_in(stock) == before
    assert set(by_metric(done["results"])) == DISTANCES
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "evaluation.json"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert len(card.data.eval_results) == 6
    command = results_in(tmp_path / "out")[0]["command"]
    assert "evaluate stock --metrics fd,kid,precision --reference train --other_reference test" in command
    # The same with the data instead of a reference, and into the model's own folder.
    again = measure(stock, data=config_of(digits))
    assert [row["value"] for row in again["results"]] == [row["value"] for row in done["results"]]
    assert [row["real_vs_real"]["value"] for row in again["results"]] == [
        row["real_vs_real"]["value"] for row in done["results"]
    ]
    assert files_in(stock).keys() - before.keys() == {"README.md", "evaluation.json"}
    # Halves, without another split.
    (row,) = measure(stock, metrics=["kid"], reference=tmp_path / "train")["results"]
    assert (row["real_vs_real"]["of"], row["real_vs_real"]["num_compared"]) == ("halves of train", [40, 150])


@pytest.mark.slow
def test_memorization_includes_mirrored_images_whatever_names_the_data(run: Path, measure: Any, digits: Path):
    save_config(config_of(digits, random_flip=True), run / "config.yaml")
    rows = measure(run, metrics=["memorization"], data=config_of(digits))["results"]
    assert all(row["memorization"]["mirrored"] for row in rows)
    assert rows[0]["num_compared"][1] == 600


@pytest.mark.slow
def test_cached_reference_gets_the_name_that_its_data_have_now(run: Path, measure: Any, digits: Path, tmp_path: Path):
    measure(run, metrics=["kid"])
    shutil.copytree(digits, tmp_path / "renamed")
    data = replace(config_of(digits), dataset_name=str(tmp_path / "renamed"))
    measure(run, metrics=["kid"], data=data)
    assert [row["reference"]["name"] for row in results_in(run)] == ["renamed"]


@pytest.mark.slow
def test_evaluate_samples_classes_as_often_as_in_the_data(
    of_classes: Path, measure: Any, digits: Path, network_file: Path, tmp_path: Path
):
    data = labeled_folder(tmp_path / "labeled", {"train": [0, 0, 0, 1] * 25, "test": [0, 1] * 10}, digits)
    config = config_of(digits, label_column="kind")
    settings = {"data": replace(config, dataset_name=str(data))}
    of_network = {"network_path": network_file}
    done = measure(of_classes, metrics=["kid", "nll"], num_images=100, **settings)
    assert by_metric(done["results"])["kid"]["sampling"]["classes"] == "as in train"
    assert by_metric(done["results"])["nll"]["num_compared"] == [20]
    # There are too few odd images and samples, 25 of each.
    assert [*by_metric(done["results"])["kid"]["by_class"]] == ["0"]
    assert "by class, unipc, 2 steps</summary>" in Path(done["card"]).read_text()
    with load_job(
        Request(model=of_classes, metrics=["kid"], num_images=4, device="cpu", **of_network, **settings)
    ) as job:
        images = load_images(settings["data"])
        features = job.comparison.network(torch.from_numpy(fixed_pixels(images).copy()))
        nearest = torch.cdist(job.comparison.reference.features.float(), features.float()).argmin(dim=1)
        assert (images.labels[nearest] == job.reference_labels).all()
    turn = measure(of_classes, metrics=["kid"], data=config_of(digits))["results"]
    assert turn[0]["sampling"]["classes"] == "each in turn"
    settings = {"metrics": ["kid"], "num_images": 4, "network_path": network_file, "device": "cpu"}
    with load_job(Request(model=of_classes, seed=5, data=config_of(digits), **settings)) as job:
        assert job.class_labels == [1, 0, 1, 0]  # image i has the class (seed + i) % 2
    with pytest.raises(UsageError, match="num_images must be at least 2, as many as classes"):
        measure(of_classes, metrics=["memorization"], data=config_of(digits), num_images=1)


def blurred(pixels: torch.Tensor, passes: int) -> torch.Tensor:
    x = pixels.float()
    for _ in range(passes):
        x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x.round().to(torch.uint8)


def noisy(pixels: torch.Tensor, std: float) -> torch.Tensor:
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels.float() + std * noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception", "efficientnet-lite0"])
def test_distances_rise_with_noise_blur_and_missing_classes(name: str, network_file: Path, tmp_path: Path):
    if name != "inception":
        pytest.importorskip("efficientnet_lite_pytorch", reason='needs pip install "hf_ddpm[evaluation]"')
    network = load_network(name, network_file if name == "inception" else None)
    cached = load_images(TrainingConfig(dataset_name="digits", label_column="label", cache_dir=str(tmp_path)))
    half = 200 if name == "inception" else 100
    pixels, labels = torch.from_numpy(fixed_pixels(cached)[: 2 * half].copy()), torch.tensor(cached.labels)
    reference, others, kinds = collect(network, [pixels[:half]]), pixels[half:], labels[half : 2 * half]

    def distances(images: torch.Tensor) -> dict[str, float]:
        # A Fréchet distance needs more images than dimensions.
        metrics = ["kid", "precision"] + (["fd"] if network.dimensions < 100 else [])
        found = measure_distances(collect(network, [images]), reference, metrics)
        return {metric: row.value for metric, row in found.items()}

    real = distances(others)
    for degrees in (
        [noisy(others, 15), noisy(others, 40), noisy(others, 100)],
        [blurred(others, 1), blurred(others, 2), blurred(others, 4)],
        [others[kinds < 6], others[kinds < 3], others[kinds < 1]],
    ):
        measured = [real, *map(distances, degrees)]
        for metric in {"kid", "fd"} & real.keys():
            rising = [row[metric] for row in measured]
            assert rising == sorted(rising), (metric, rising)
        assert measured[-1]["coverage"] < real["coverage"]
