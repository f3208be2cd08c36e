"""PSNR and SSIM, and how `evaluate` measures them."""

import json
import math

import pytest
import torch
from diffusers import UNet2DModel
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, evaluate
from hf_ddpm.condition import Condition
from hf_ddpm.data.conditions import example_pairs
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.splits import open_split
from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.evaluation.fidelity import mean_of, psnr, ssim, window_size
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import iter_samples
from tests.support.networks import smallest_unet_config

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


def images(channels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(3, channels, size, size, generator=generator, dtype=torch.float64)
    return (truth + 0.2 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)).clamp(0, 1), truth


@pytest.mark.parametrize("channels", [1, 3])
def test_formulas_equal_those_of_torchmetrics(channels):
    x, truth = images(channels, 24)
    settings = {"data_range": 1.0, "reduction": "none"}
    wanted = peak_signal_noise_ratio(x, truth, dim=(1, 2, 3), **settings)
    assert torch.allclose(psnr(x, truth), wanted)
    _, everywhere = structural_similarity_index_measure(x, truth, return_full_image=True, **settings)
    # It also takes places where the window sticks out of the image, which it mirrors there.
    inside = everywhere[..., 5:-5, 5:-5]
    assert torch.allclose(ssim(x, truth), inside.flatten(1).mean(dim=1))


def test_truth_itself_gets_the_best_of_both():
    _, truth = images(1, 8)
    assert window_size(8, 8) == 7
    assert torch.allclose(ssim(truth, truth), torch.ones(3, dtype=torch.float64))
    assert psnr(truth, truth).tolist() == [math.inf] * 3
    assert mean_of(psnr(truth, truth)) == (None, None)
    # An error of 1/10 everywhere is 20 dB.
    assert psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1)).item() == pytest.approx(20, abs=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of super-resolution whose network has weights of chance."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(1, in_channels=2))
    pipeline = ConditionalDDPMPipeline(
        unet, DDPMScheduler(10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    )
    pipeline.condition = Condition(1, super_resolution=2)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_evaluate_measures_samples_and_their_inputs(model, tmp_path):
    data = DataConfig(dataset_name="digits", cache_dir=str(tmp_path / "cache"))
    settings = {"data": data, "test_split": "train", "num_images": 20, "num_inference_steps": [2]}
    result = evaluate(model, metrics=["psnr", "ssim"], out=tmp_path / "out", **settings)
    by_name = {row["metric"]: row for row in result["results"]}
    assert [*by_name] == ["psnr", "ssim"]
    for row in by_name.values():
        assert row["num_compared"] == [20]
        assert row["sampling"]["network_evaluations"] == 2
        # A network of chance makes worse images than cubic interpolation.
        assert row["value"] < row["input"]["value"]
    text = (tmp_path / "out/README.md").read_text()
    assert "PSNR in dB" in text
    assert "task:\n      type: image-to-image" not in text  # `out` holds no model, which would say so
    stored = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert stored["results"][0]["value"] == by_name["psnr"]["value"]
    # Fewer images are the first of these, with the same seeds.
    again = evaluate(model, metrics=["psnr"], out=tmp_path / "again", **{**settings, "num_images": 20})
    assert again["results"][0]["value"] == by_name["psnr"]["value"]


@pytest.mark.slow
def test_distances_are_those_of_the_samples_from_the_truth(model, digits, network_file, tmp_path):
    data = DataConfig(dataset_name=str(digits), cache_dir=str(tmp_path / "cache"))
    settings = {"data": data, "num_inference_steps": [2], "network_path": network_file, "device": "cpu"}
    result = evaluate(model, metrics=["fd", "kid", "psnr"], out=tmp_path / "out", **settings)
    rows = {row["metric"]: row for row in result["results"]}
    assert [*rows] == ["psnr", "fd", "kid"]

    pipeline, steps = load_for_sampling(str(model), None, 2, "cpu", makes_from_images=True)
    network = load_network("inception", network_file)
    with open_split(DataConfig(**{**vars(data), "resolution": 8, "channels": 1}), "test") as held_out:
        pairs = example_pairs(pipeline.condition, held_out, 120)
    batches = iter_samples(pipeline, range(120), batch_size=16, num_inference_steps=steps, conditions=pairs.conditions)
    X, Y = (network(images) for images in (torch.cat([x for _, x in batches]), (pairs.images * 255).round().byte()))
    assert rows["fd"]["value"] == pytest.approx(frechet_distance(Moments.of(X), Moments.of(Y)), rel=1e-6)
    assert rows["kid"]["value"] == pytest.approx(kernel_distance(X, Y).distance, rel=1e-6)
    for name in ("fd", "kid"):
        assert rows[name]["num_compared"] == [120, 120]
        assert (rows[name]["reference"]["split"], rows[name]["held_out"]["split"]) == ("test", "test")
        assert rows[name]["real_vs_real"]["of"] == "train against test"
    assert rows["kid"]["sampling"]["num_images"] == 120


def test_wrong_metrics_are_one_line(model, tmp_path):
    with pytest.raises(
        UsageError, match=r"must be of .*, ssim, lpips for a model that makes images from images, got nll"
    ):
        evaluate(model, metrics=["nll"], out=tmp_path)
    with pytest.raises(
        UsageError, match=r"metrics must be of psnr, ssim, lpips, fd, .* with psnr or ssim or lpips, got psnr, nll"
    ):
        evaluate(model, metrics=["psnr", "nll"], out=tmp_path)
    with pytest.raises(UsageError, match="test_split must be train, which is all that digits has"):
        evaluate(model, metrics=["psnr"], data=DataConfig(dataset_name="digits"), out=tmp_path)
    plain = tmp_path / "plain"
    DDPMPipeline(UNet2DModel(**smallest_unet_config(1)), DDPMScheduler()).save_pretrained(plain)
    with pytest.raises(UsageError, match="for a model that makes images from noise alone, got psnr"):
        evaluate(plain, metrics=["psnr"])
