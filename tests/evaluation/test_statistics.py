"""Tests of hf_ddpm.evaluation.statistics: references are stored as computed, and only comparable ones are compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.data.images import load_images
from hf_ddpm.data.splits import open_split
from hf_ddpm.evaluation.distances import frechet_distance, kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork, load_network
from hf_ddpm.evaluation.statistics import (
    TOO_FEW_IMAGES,
    Reference,
    check_comparable,
    collect,
    frechet_warnings,
    load_reference,
    make_reference,
    real_vs_real,
)
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def network_of(**changes: Any) -> FeatureNetwork:
    """Return a quick network whose 12 features are the means of the image's quarters."""
    identity = {"network": "quarters", "weights_sha256": "0" * 64, "input_size": 2, "information": {"torch": "any"}}
    pool = torch.nn.AdaptiveAvgPool2d(2)
    device = torch.device("cpu")
    return FeatureNetwork("clip", 12, identity | changes, device, lambda images: pool(images.float()).flatten(1))


def save_images(folder: Path, count: int, size: tuple[int, int] = (8, 8), first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A folder with 40 images in `train` and 20 in `test`."""
    save_images(tmp_path / "data" / "train", 40)
    save_images(tmp_path / "data" / "test", 20, first=40)
    return tmp_path / "data"


def config_of(folder: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig(dataset_name=str(folder), **{"cache_dir": str(folder.parent / "cache"), **settings})


def make(folder: Path, split: str = "train", out: str = "reference", **settings: Any) -> Reference:
    options = {name: settings.pop(name) for name in ("num_features", "batch_size") if name in settings}
    config = config_of(folder, **settings)
    return make_reference(config, split, network_of(), folder.parent / out, **options)


def assert_same(a: Reference, b: Reference) -> None:
    assert a.metadata == b.metadata
    assert torch.equal(a.features, b.features)
    for name, tensor in vars(a.moments).items():
        assert torch.equal(tensor, vars(b.moments)[name])


def test_load_reference_returns_what_make_reference_wrote(splits: Path):
    reference = make(splits, "test")
    assert sorted(path.name for path in splits.parent.iterdir()) == ["cache", "data", "reference"]
    assert_same(load_reference(splits.parent / "reference"), reference)
    assert reference.count == 20
    data = reference.metadata["data"]
    assert (data["name"], data["split"], data["count"], data["channels"], data["crop"]) == (
        "data",
        "test",
        20,
        3,
        "none",
    )
    assert data["fingerprint"] == load_images(config_of(splits / "test")).fingerprint
    assert reference.metadata["network"] == network_of().identity
    assert {"hf_ddpm", "torch", "datasets", "Pillow", "numpy"} == set(reference.metadata["versions"])
    # References are shared, so they must not contain local paths.
    assert str(splits.parent) not in (splits.parent / "reference" / "reference.json").read_text()


def test_make_reference_computes_the_statistics_of_the_decoded_images(splits: Path):
    reference = make(splits)
    images = load_images(config_of(splits))
    pixels = torch.from_numpy(np.stack([images.image(i) for i in range(len(images))]))
    features = network_of()(pixels)
    assert reference.moments.mean.dtype == torch.float64
    assert torch.allclose(reference.moments.mean, features.double().mean(dim=0))
    assert torch.allclose(reference.moments.scatter / 39, features.double().T.cov())
    # The same rows, in another order.
    assert reference.features.dtype == torch.float32
    assert sorted(map(tuple, reference.features.tolist())) == sorted(map(tuple, features.tolist()))
    assert not torch.equal(reference.features, features)


@pytest.mark.parametrize("size", [(8, 8), (8, 11)])
def test_stored_features_do_not_depend_on_the_batch_size(splits: Path, size: tuple[int, int]):
    if size != (8, 8):
        save_images(splits / "train", 40, size)
    first = make(splits, out="a", num_features=15, batch_size=7, resolution=8)
    second = make(splits, out="b", num_features=15, batch_size=40, resolution=8)
    assert torch.equal(first.features, second.features)
    assert first.features.shape == (15, 12)
    assert first.count == second.count == 40
    assert first.metadata["num_features"] == 15
    assert torch.allclose(first.moments.scatter, second.moments.scatter)
    assert first.metadata["data"]["crop"] == ("none" if size == (8, 8) else "random, seed 0")
    whole = make(splits, out="c", resolution=8)
    assert torch.equal(whole.features[:15], first.features)


def test_make_reference_crops_as_training_does(splits: Path):
    save_images(splits / "train", 40, (8, 11))
    reference = make(splits, resolution=8, center_crop=True)
    assert reference.metadata["data"]["crop"] == "center"
    assert reference.metadata["data"]["fingerprint"] == (
        load_images(config_of(splits, resolution=8, center_crop=True)).fingerprint
    )


def test_fingerprint_does_not_depend_on_the_location_of_the_images(splits: Path, tmp_path: Path):
    other = tmp_path / "elsewhere" / "copy"
    shutil.copytree(splits, other)
    first, second = make(splits, "test"), make(other, "test")
    assert first.metadata["data"]["fingerprint"] == second.metadata["data"]["fingerprint"]
    assert torch.equal(first.features, second.features)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "saved", "parquet"])
def test_open_split_reads_each_kind_of_data_set(splits: Path, tmp_path: Path, kind: str):
    folder = splits
    if kind != "images":
        folder = tmp_path / kind
        files = {name: f"{splits / name}/*" for name in ("train", "test")}
        dataset: Any = datasets.load_dataset("imagefolder", data_files=files, cache_dir=str(tmp_path / "cache"))
        if kind == "saved":
            dataset.save_to_disk(folder)
        else:
            for name in files:
                embedded = (
                    dataset[name]
                    .cast_column("image", datasets.Image(decode=False))
                    .map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
                )
                embedded.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    expected = {name: load_images(config_of(splits / name)).fingerprint for name in ("train", "test")}
    for name, fingerprint in expected.items():
        with open_split(config_of(folder), name) as images:
            assert images.fingerprint == fingerprint
            assert len(images) == {"train": 40, "test": 20}[name]
    with (
        pytest.raises(UsageError, match=r"split must be .*got 'validation'"),
        open_split(config_of(folder), "validation"),
    ):
        pass


def test_open_split_takes_a_folder_without_other_splits(splits: Path, tmp_path: Path):
    shutil.copytree(splits / "test", tmp_path / "alone/test")
    with open_split(config_of(tmp_path / "alone"), "test") as images:
        assert len(images) == 20
    with (
        pytest.raises(UsageError, match="test_split must be held out, got 'test' of 'alone', all of which"),
        open_split(config_of(tmp_path / "alone"), "test", "test_split"),
    ):
        pass


def test_open_split_refuses_unknown_splits(splits: Path, tmp_path: Path):
    for config, split, message in (
        (TrainingConfig(cache_dir=str(tmp_path)), "test", "split must be train, which is all that digits has"),
        (config_of(splits), "../data/test", "split must be a name"),
        (config_of(splits), "", "split must be a name"),
        (
            TrainingConfig(train_data_dir=str(splits), cache_dir=str(tmp_path)),
            "validation",
            "split must be in train_data_dir",
        ),
    ):
        with pytest.raises(UsageError, match=message), open_split(config, split):
            pass


def test_make_reference_refuses_invalid_settings_before_reading_images(splits: Path):
    with pytest.raises(UsageError, match="channels must be 1 or 3"):
        make(splits, channels=4)
    (splits.parent / "reference").mkdir()
    with pytest.raises(UsageError, match="out must be a new folder"):
        make(splits)
    (splits.parent / "file").touch()
    with pytest.raises(UsageError, match=r"out must be a folder that can be written, got .*: see .*file$"):
        make(splits, out="file/reference")
    assert not (splits.parent / "cache").exists()


def test_make_reference_removes_an_incomplete_reference(splits: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 12), torch.nan)

    out = splits.parent / "reference"
    with pytest.raises(UsageError, match="features must be finite"):
        make_reference(config_of(splits), "train", replace(network_of(), compute=broken), out)

    def full(path: Path, content: bytes | str) -> None:
        if path.suffix == ".json":
            raise OSError("no space left on device")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    monkeypatch.setattr("hf_ddpm.evaluation.reference_files.write_flushed", full)
    with pytest.raises(UsageError, match="no space left"):
        make(splits)
    assert sorted(path.name for path in splits.parent.iterdir()) == ["cache", "data"]


def test_load_reference_refuses_damaged_files(splits: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="make one with `hf-ddpm reference`"):
        load_reference(tmp_path / "nowhere")
    make(splits)
    folder = tmp_path / "reference"
    metadata = json.loads((folder / "reference.json").read_text())
    content = (folder / "reference.safetensors").read_bytes()
    (folder / "reference.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UsageError, match="make it again") as caught:
        load_reference(folder)
    assert metadata["sha256"] in str(caught.value)
    (folder / "reference.safetensors").unlink()
    with pytest.raises(UsageError, match=r"cannot be read: .*: make it again"):
        load_reference(folder)
    (folder / "reference.json").write_text(json.dumps({**metadata, "format": 2}))
    with pytest.raises(UsageError, match="must have the format 1, got 2"):
        load_reference(folder)
    (folder / "reference.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot be read: .*: make it again"):
        load_reference(folder)


def test_check_comparable_shows_all_settings_that_differ(splits: Path):
    reference = make(splits)
    check_comparable(reference, network_of(), (8, 8), 3)
    check_comparable(
        load_reference(splits.parent / "reference"), network_of(information={"torch": "other"}), (8, 8), 3
    )
    with pytest.raises(UsageError, match="they differ in") as caught:
        check_comparable(reference, network_of(weights_sha256="f" * 64, blur=1), (32, 32), 1)
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert lines[1] == ["the", "reference", "the", "samples"]
    assert lines[2:6] == [
        ["resolution", "8", "32"],
        ["channels", "3", "1"],
        ["weights_sha256", "0" * 64, "f" * 64],
        ["blur", "-", "1"],
    ]
    assert "input_size" not in str(caught.value)
    for resolution, channels in ((9, 3), (8, 1)):
        with pytest.raises(UsageError, match="they differ in"):
            check_comparable(reference, network_of(), (resolution, resolution), channels)


def test_real_vs_real_returns_two_splits_or_two_halves(splits: Path):
    train, test = make(splits), make(splits, "test", out="test")
    assert real_vs_real(train, test) == (train, test)
    halves = real_vs_real(train)
    assert [half.count for half in halves] == [20, 20]
    together = halves[0].moments.merge(halves[1].moments)
    assert torch.allclose(together.mean, train.moments.mean)
    assert torch.allclose(together.scatter, train.moments.scatter)
    for first, second in (halves, real_vs_real(train, test)):
        assert frechet_distance(first.moments, second.moments) > 0
        kid = kernel_distance(first.features, second.features)
        assert abs(kid.distance) < 5 * kid.standard_error
    with pytest.raises(UsageError, match="the same twice"):
        real_vs_real(train, make(splits, out="again"))
    with pytest.raises(UsageError, match="one reference"):
        real_vs_real(train, make(splits, "test", out="small", resolution=4))
    with pytest.raises(UsageError, match="at least 4 features, got 3"):
        real_vs_real(make(splits, out="few", num_features=3))


def test_frechet_warnings_name_too_few_images(splits: Path):
    expected = TOO_FEW_IMAGES.format(count=12, dimensions=12, network="clip")
    assert frechet_warnings(12, network_of()) == [expected]
    assert frechet_warnings(13, network_of()) == []
    assert make(splits).metadata["warnings"] == []
    save_images(splits / "few", 12)
    make(splits, "few", out="few")
    assert load_reference(splits.parent / "few").metadata["warnings"] == [expected]


def test_collect_refuses_no_images():
    with pytest.raises(UsageError, match="batches must hold images"):
        collect(network_of(), [])


def test_make_reference_converts_16_bits_to_8(tmp_path: Path):
    (tmp_path / "data").mkdir()
    values = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    for i in range(3):
        Image.fromarray(values + np.uint16(i)).save(tmp_path / "data" / f"{i}.png")
    reference = make(tmp_path / "data")
    assert reference.count == 3
    assert reference.metadata["data"]["channels"] == 1
    assert reference.features.max() <= 255


@pytest.mark.slow
def test_make_reference_with_efficientnet(splits: Path):
    pytest.importorskip("efficientnet_lite_pytorch", reason='needs pip install "hf_ddpm[evaluation]"')
    network = load_network("efficientnet-lite0")
    make_reference(config_of(splits), "test", network, splits.parent / "reference")
    reference = load_reference(splits.parent / "reference")
    check_comparable(reference, network, (8, 8), 3)
    assert reference.metadata["warnings"] == [
        TOO_FEW_IMAGES.format(count=20, dimensions=1280, network="efficientnet-lite0")
    ]
    with pytest.raises(UsageError, match=r"efficientnet-lite0 +quarters"):
        check_comparable(reference, network_of(), (8, 8), 3)
