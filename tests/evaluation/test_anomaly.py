"""Anomaly maps and scores: right for a distribution whose reconstructions are known, whoever computes them."""

import csv
import itertools
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from benchmarks.schedulers.run import MEAN, NETWORK, SPREAD, Exact
from hf_ddpm import DDPMPipeline, DDPMScheduler, UsageError
from hf_ddpm.classes import Classes, write_classes
from hf_ddpm.data.config import DataConfig
from hf_ddpm.editing import num_steps_of
from hf_ddpm.evaluation import anomaly
from hf_ddpm.evaluation.anomaly import anomaly_maps, auroc, reconstruct, scores_of
from hf_ddpm.evaluation.detection import find_anomalies
from hf_ddpm.sampling.sampler import seeded_generators
from hf_ddpm.solvers import named_scheduler
from tests.support.forks import Process
from tests.support.networks import smallest_unet_config


@pytest.fixture
def exact():
    """A function: the name of a scheduler -> a pipeline that knows N(MEAN, SPREAD^2) exactly."""

    def make(name: str = "unipc", num_steps: int = 50) -> DDPMPipeline:
        config = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
        return DDPMPipeline(Exact(**NETWORK).eval(), named_scheduler(name, config, num_steps))

    return make


def constant(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("strength", [0.2, 0.5])
def test_reconstruct_follows_the_ode_from_the_noised_image(exact, name, strength):
    """It keeps the quantile of each value: x_0_hat = MEAN + SPREAD (x_t - a MEAN) / sqrt(a^2 SPREAD^2 + b^2)."""
    pipeline = exact(name, 400)
    x_0 = constant(MEAN, 0.0, 0.5)
    (first,) = anomaly.set_last_timesteps(pipeline, strength, 400)[:1].tolist()
    assert first == pytest.approx(1000 * strength, abs=3)
    x_0_hat = reconstruct(pipeline, x_0, seeded_generators([4, 5, 6], x_0.device), strength, 400)
    alpha_bar = DDPMScheduler().alpha_bar[first]
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (4, 5, 6)])
    expected = MEAN + SPREAD * (a * x_0 + b * eps - a * MEAN) / (a**2 * SPREAD**2 + b**2).sqrt()
    torch.testing.assert_close(x_0_hat, expected.clamp(-1, 1).float(), atol=0.02, rtol=0)


def test_scores_are_the_expected_squared_error(exact):
    """E (x_0_hat - x_0)^2 = (1 - k a)^2 (x_0 - MEAN)^2 + k^2 b^2, k = SPREAD / sqrt(a^2 SPREAD^2 + b^2)."""
    pipeline, x_0 = exact("unipc", 50), constant(0.1, 0.3, -0.2).repeat_interleave(16, dim=0)
    settings = {"strengths": (0.3, 0.6), "num_inference_steps": 50, "num_reconstructions": 2}
    maps, reconstructions = anomaly_maps(pipeline, x_0, range(48), **settings)
    assert maps.shape == (48, 8, 8)
    assert reconstructions.shape == (48, 2, 1, 8, 8)
    expected = torch.zeros(3, dtype=torch.float64)
    for strength in settings["strengths"]:
        first = anomaly.set_last_timesteps(pipeline, strength, 50)[0]
        alpha_bar = DDPMScheduler().alpha_bar[first]
        k = SPREAD / (alpha_bar * SPREAD**2 + 1 - alpha_bar).sqrt()
        d = x_0[::16, 0, 0, 0].double() - MEAN
        expected += ((1 - k * alpha_bar.sqrt()) ** 2 * d**2 + k**2 * (1 - alpha_bar)) / 2
    scores = scores_of(maps).view(3, 16)
    # The mean of 2,048 squares, of which each strength makes a half.
    torch.testing.assert_close(scores.mean(dim=1), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 100), ("unipc", 10)])
def test_images_far_from_the_mean_score_higher(exact, name, steps):
    x_0 = constant(MEAN, MEAN + 1.5 * SPREAD, MEAN - 2.5 * SPREAD, -1.0)
    maps, _ = anomaly_maps(
        exact(name, steps), x_0, range(4), strengths=[0.5], num_inference_steps=steps, num_reconstructions=4
    )
    assert scores_of(maps).diff().min() > 0


def test_map_is_high_where_the_image_is_anomalous(exact):
    x_0 = constant(MEAN)
    x_0[:, :, 2:4, 5] = -1
    maps, _ = anomaly_maps(exact(), x_0, [0], strengths=[0.3, 0.5], num_inference_steps=10, num_reconstructions=4)
    highest = maps[0].flatten().topk(2).indices
    assert sorted(highest.tolist()) == [2 * 8 + 5, 3 * 8 + 5]


def test_maps_depend_on_the_seed_of_the_image_alone(exact):
    pipeline, x_0 = exact("ddpm", 20), constant(0.1, 0.2, 0.3)
    settings = {"strengths": [0.4], "num_inference_steps": 20}
    maps, _ = anomaly_maps(pipeline, x_0, [7, 8, 9], **settings)
    again, _ = anomaly_maps(pipeline, x_0[[2, 0]], [9, 7], **settings)
    torch.testing.assert_close(again, maps[[2, 0]])
    other, _ = anomaly_maps(pipeline, x_0, [10, 8, 9], **settings)
    assert not torch.allclose(other[0], maps[0])
    torch.testing.assert_close(other[1:], maps[1:])


def test_strength_1_takes_all_steps_and_a_small_one_takes_one():
    assert [num_steps_of(strength, 20) for strength in (1, 0.5, 0.26, 0.25, 0.01)] == [20, 10, 5, 5, 1]


def test_arguments_of_anomaly_maps_are_checked(exact):
    pipeline, x_0 = exact(), constant(0.1, 0.2)
    for strengths in ([], [0], [1.2], [0.5, float("nan")]):
        with pytest.raises(UsageError, match=r"strength must be .*\(0, 1\]"):
            anomaly_maps(pipeline, x_0, [0, 1], strengths=strengths, num_inference_steps=5)
    with pytest.raises(UsageError, match="seeds must hold one for each of 2 images, got 1"):
        anomaly_maps(pipeline, x_0, [0], strengths=[0.5], num_inference_steps=5)
    with pytest.raises(UsageError, match="num_reconstructions must be at least 1, got 0"):
        anomaly_maps(pipeline, x_0, [0, 1], strengths=[0.5], num_inference_steps=5, num_reconstructions=0)


def test_auroc_is_the_share_of_pairs_that_are_in_order():
    rng = np.random.default_rng(0)
    for high in (3, 10, 10**9):
        scores = rng.integers(0, high, 40).astype(float)
        is_anomalous = rng.random(40) < 0.4
        pairs = [*itertools.product(scores[is_anomalous], scores[~is_anomalous])]
        expected = sum((x > y) + (x == y) / 2 for x, y in pairs) / len(pairs)
        found = auroc(scores, is_anomalous)
        assert found.value == pytest.approx(expected, abs=1e-12)
        assert auroc(np.exp(scores / high), is_anomalous) == found
        assert auroc(-scores, is_anomalous).value == pytest.approx(1 - expected, abs=1e-12)
        assert auroc(scores, ~is_anomalous).standard_error == pytest.approx(found.standard_error)


def test_auroc_is_one_half_for_equal_scores_and_1_for_perfect_ones():
    is_anomalous = np.array([True, False, False, True])
    assert auroc(np.full(4, 0.3), is_anomalous) == (0.5, 0)
    assert auroc(np.array([3.0, 1, 2, 4]), is_anomalous) == (1, 0)
    assert auroc(np.array([3.0, 1]), np.array([True, False])) == (1, None)
    with pytest.raises(UsageError, match="needs normal and anomalous images, got 0 normal and 4 anomalous"):
        auroc(np.arange(4), np.ones(4, bool))


def test_auroc_has_the_standard_error_of_its_samples():
    rng = np.random.default_rng(0)
    is_anomalous = np.arange(150) < 50
    found = [auroc(rng.normal(is_anomalous), is_anomalous) for _ in range(400)]
    spread = np.std([each.value for each in found])
    assert np.mean([each.standard_error or 0 for each in found]) == pytest.approx(spread, rel=0.1)


@pytest.fixture
def model(tmp_path) -> Path:
    return save_model(tmp_path / "model")


def save_model(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(channels=1), **changes)
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Twenty gray images in the classes `good` and `scratched`, and two more in `torn`."""
    rng = np.random.default_rng(0)
    for i in range(22):
        folder = tmp_path / "images" / ("torn" if i > 19 else "scratched" if i % 4 == 0 else "good")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return DataConfig(dataset_name=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"), label_column="label")


SMALL = {"num_inference_steps": 4, "num_reconstructions": 1, "device": "cpu"}


@pytest.mark.slow
def test_find_anomalies_writes_scores_maps_and_what_they_tell(model, data, tmp_path):
    out = tmp_path / "out"
    result = find_anomalies(model, data, out, normal=["good"], num_maps=3, **SMALL)
    assert sorted(path.name for path in out.iterdir()) == ["anomaly.json", "grid.png", "maps", "scores.csv"]
    assert json.loads((out / "anomaly.json").read_text()) == result
    rows = [*csv.DictReader((out / "scores.csv").read_text().splitlines())]
    names = sorted(path.relative_to(data.dataset_name).as_posix() for path in Path(data.dataset_name).rglob("*.png"))
    assert [row["file_name"] for row in rows] == names
    assert all(row["label"] == row["file_name"].split("/")[0] for row in rows)
    scores = np.array([float(row["score"]) for row in rows])
    highest = [names[i] for i in np.argsort(-scores)[:3]]
    assert sorted(path.relative_to(out / "maps").as_posix() for path in (out / "maps").rglob("*.*")) == sorted(highest)
    labels = np.array([row["label"] for row in rows])
    assert result["auroc"]["value"] == auroc(scores, labels != "good").value
    assert {name: area["num_anomalous"] for name, area in result["auroc_by_class"].items()} == {
        "scratched": 5,
        "torn": 2,
    }
    with Image.open(out / "maps" / highest[0]) as picture:
        assert (picture.size, picture.mode) == ((8, 8), "RGB")


def test_find_anomalies_without_classes_scores_alone(model, data, tmp_path):
    plain = DataConfig(dataset_name=data.dataset_name, cache_dir=data.cache_dir)
    result = find_anomalies(model, plain, tmp_path / "out", num_maps=0, **SMALL)
    assert result["auroc"] is None
    assert (tmp_path / "out" / "scores.csv").read_text().startswith("file_name,score\ngood/01.png,0.")
    assert not (tmp_path / "out" / "maps").exists()


def score(rank: int, size: int, port: int, arguments: dict) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}
    find_anomalies(**arguments)


@pytest.mark.slow
def test_find_anomalies_writes_the_same_in_any_batch_size_and_number_of_processes(model, data, tmp_path):
    written = []
    for size, batch_size in ((1, 64), (1, 3), (2, 64)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"{size}-{batch_size}"
        arguments = {"model": model, "data": data, "out": out, "batch_size": batch_size, "normal": ["good"], **SMALL}
        children = [Process(target=score, args=(rank, size, port, arguments)) for rank in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * size
        written.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert len(written[0]) == 3 + 22
    assert written[0] == written[1] == written[2]


@pytest.fixture
def no_denoising(monkeypatch):
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_, **__: pytest.fail("denoised before all was checked"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strengths": [1.5]}, r"strength must be in \(0, 1\], the share of the steps of sampling, got 1.5"),
        ({"strengths": []}, r"strength must be one or more numbers in \(0, 1\], got none"),
        ({"num_reconstructions": 0}, "num_reconstructions must be at least 1, got 0"),
        ({"num_maps": -1}, "num_maps must be at least 0, got -1"),
        ({"num_inference_steps": 21}, r"num_inference_steps must be in \[1, 20\], got 21"),
        ({"seed": 2**63 - 5}, r"seed must be in .*, got \d+ as the first of 22"),
        (
            {"normal": ["goood"]},
            "normal must be classes of the data, good, .*, got 'goood'; did you mean good",
        ),
        ({"normal": ["3"]}, "normal must be classes of the data, .* got '3'"),
        (
            {"normal": ["good", "1", "torn"]},
            "normal must leave .*, got good, 1, torn, by which all 22 images are",
        ),
        ({"split": "test"}, "split must be in dataset_name as a folder, got 'test'"),
        ({"data": {"label_column": None}, "normal": ["good"]}, "normal needs the classes .*: give --label_column"),
        ({"data": {"label_column": "kind"}}, r"label_column must be one of .*, got 'kind'"),
        ({"data": {"channels": 3}}, "channels must be the model's, 1, got 3: leave it out"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_denoising")
def test_find_anomalies_rejects_what_cannot_work(model, data, tmp_path, settings, message):
    given = {**vars(data), **settings.pop("data", {})}
    with pytest.raises(UsageError, match=message):
        find_anomalies(model, DataConfig(**given), tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_denoising")
def test_find_anomalies_rejects_other_channels_and_folders_that_hold_something(model, data, tmp_path):
    colors = tmp_path / "colors"
    colors.mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(colors / "a.png")
    with pytest.raises(UsageError, match=r"must have the model's channels, 1, got 3 in 'colors': --channels 1 "):
        find_anomalies(model, DataConfig(str(colors), cache_dir=data.cache_dir), tmp_path / "out", **SMALL)
    with pytest.raises(UsageError, match=r"out must be a new or an empty folder, got .*, which holds 'a\.png'"):
        find_anomalies(model, data, colors, **SMALL)
    with pytest.raises(UsageError, match=r"out must not be in the folder of images, .*: give another --out"):
        find_anomalies(model, data, Path(data.dataset_name) / "out", **SMALL)


@pytest.mark.slow
def test_model_with_classes_takes_the_class_of_each_image(data, tmp_path):
    of_classes = save_model(tmp_path / "classes", num_class_embeds=3)
    write_classes(tmp_path / "classes", Classes(("torn", "scratched", "good")))
    find_anomalies(of_classes, data, tmp_path / "out", **SMALL)
    # The same classes have other numbers now, so that images get other embeddings.
    write_classes(tmp_path / "classes", Classes(("good", "scratched", "torn")))
    find_anomalies(of_classes, data, tmp_path / "renamed", **SMALL)
    assert (tmp_path / "out" / "scores.csv").read_bytes() != (tmp_path / "renamed" / "scores.csv").read_bytes()
    write_classes(tmp_path / "classes", Classes(("good", "scratched", "bent")))
    with pytest.raises(UsageError, match="the model must know the class of each image, got 'torn', which is none of"):
        find_anomalies(of_classes, data, tmp_path / "other", **SMALL)
    without = DataConfig(dataset_name=data.dataset_name, cache_dir=data.cache_dir)
    with pytest.raises(UsageError, match="label_column must name the class of each image, which a model of 3 classes"):
        find_anomalies(of_classes, without, tmp_path / "other", **SMALL)


@pytest.mark.slow
def test_model_with_class_dropout_reconstructs_unknown_classes_without_a_class(data, tmp_path):
    model = save_model(tmp_path / "dropout", num_class_embeds=3)
    write_classes(tmp_path / "dropout", Classes(("good", "scratched"), has_unconditional=True))
    find_anomalies(model, data, tmp_path / "labeled", **SMALL)
    without = DataConfig(dataset_name=data.dataset_name, cache_dir=data.cache_dir)
    find_anomalies(model, without, tmp_path / "unlabeled", **SMALL)
    texts = [(tmp_path / name / "scores.csv").read_text() for name in ("labeled", "unlabeled")]
    scores = [[row["score"] for row in csv.DictReader(text.splitlines())] for text in texts]
    assert scores[0] == scores[1]


def test_names_that_are_numbers_are_names(data, tmp_path):
    """Folders 3 and 7 are not the classes 0 and 1 of a model whose classes are called "0" to "9"."""
    model = save_model(tmp_path / "digits", num_class_embeds=10)
    write_classes(tmp_path / "digits", Classes(tuple(map(str, range(10)))))
    folder = tmp_path / "two"
    for i, path in enumerate(sorted(Path(str(data.dataset_name)).rglob("*.png"))[:4]):
        target = folder / ("3", "7")[i % 2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    settings = DataConfig(dataset_name=str(folder), label_column="label", cache_dir=data.cache_dir)
    find_anomalies(model, settings, tmp_path / "out", **SMALL)
    # Of a model that knows these two alone, as 3 and 7 are its own.
    weights = UNet2DModel.from_pretrained(model / "unet")
    two = save_model(tmp_path / "pair", num_class_embeds=2)
    other = UNet2DModel.from_pretrained(two / "unet")
    state = weights.state_dict()
    state["class_embedding.weight"] = state["class_embedding.weight"][[3, 7]]
    other.load_state_dict(state)
    other.save_pretrained(two / "unet")
    find_anomalies(two, settings, tmp_path / "same", **SMALL)
    assert (tmp_path / "out/scores.csv").read_text() == (tmp_path / "same/scores.csv").read_text()
