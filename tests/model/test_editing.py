"""Editing of images: what stays, what changes, and that the network's own distribution decides what fills a gap."""

import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline as StockPipeline
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.editing import EDITING_SCHEDULERS
from hf_ddpm.inpainting import repaint_levels
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.solvers import Sampler, named_scheduler
from hf_ddpm.timesteps import SearchedTimesteps
from tests.support.gaussian import gaussian_network, smooth_covariance
from tests.support.networks import smallest_unet_config

T = 50


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler(**settings):
    return DDPMScheduler(T, **{"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", **settings})


def editor(cls, channels=3, unet=None, size: Any = 8, **settings) -> Any:
    torch.manual_seed(0)
    twice = str(settings.get("variance_type", "")).startswith("learned")
    changes = {"sample_size": size, "out_channels": channels * (1 + twice)}
    unet = diffusers.UNet2DModel(**smallest_unet_config(channels, **changes)).eval() if unet is None else unet
    pipeline = cls(unet, scheduler(**settings))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count=2, channels=3, height=8, width=8):
    """Arrays (B, H, W, C) of uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def as_pil(arrays):
    return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in arrays]


MASK = np.zeros((8, 8), dtype=np.uint8)
MASK[2:7, 3:] = 255

# Each prediction type and variance, with the schedulers that sample it.
MODELS = [
    *[({"prediction_type": "epsilon"}, name) for name in UNTUNED_SCHEDULERS],
    *[({"prediction_type": kind}, name) for kind in ("sample", "v_prediction") for name in ("unipc", "ddpm")],
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "ddim"),
    ({"prediction_type": "epsilon", "variance_type": "learned_range"}, "ddpm"),
    ({"prediction_type": "epsilon", "variance_type": "learned_range"}, "dpmsolver++"),
    ({"prediction_type": "epsilon", "clip_sample": False}, "unipc"),
    ({"prediction_type": "previous_sample"}, "ddpm"),
]


@pytest.mark.parametrize(("settings", "name"), MODELS, ids=str)
@pytest.mark.parametrize("method", ["posterior", "replace"])
def test_known_pixels_stay_bit_for_bit_and_others_change(settings, name, method):
    inpaint, given = editor(DDPMInpaintPipeline, **settings), pictures()
    inpaint.use(name, 3)
    floats = given.astype(np.float32) / 255
    known = MASK < 128
    for output_type in ("pil", "np", "pt"):
        images = inpaint(as_pil(given), MASK, generator=seeded(), method=method, output_type=output_type).images
        if output_type == "pil":
            edited, expected = np.stack([np.array(image) for image in images]), given
        else:
            edited, expected = (images if output_type == "np" else images.permute(0, 2, 3, 1).numpy()), floats
        assert np.isfinite(edited).all()
        assert np.array_equal(edited[:, known], expected[:, known])
        assert not np.array_equal(edited[:, ~known], expected[:, ~known])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_repaint_keeps_known_pixels_of_images_that_are_not_square(channels):
    inpaint, given = editor(DDPMInpaintPipeline, channels, size=(8, 4)), pictures(1, channels, 8, 4)
    mask = np.arange(32).reshape(8, 4) % 2 == 0
    inpaint.use("ddpm", 6)
    (image,) = inpaint(
        as_pil(given), mask, generator=seeded(), method="repaint", jump_length=2, jump_n_sample=2
    ).images
    edited = np.array(image).reshape(8, 4, channels)
    assert np.array_equal(edited[~mask], given[0][~mask])
    assert not np.array_equal(edited[mask], given[0][mask])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_what_is_under_the_mask_does_not_count():
    """With a noise schedule that leaves some of the image in x_T, too."""
    inpaint, given = editor(DDPMInpaintPipeline, beta_schedule="linear", beta_end=0.2), pictures(1)
    other = given.copy()
    other[:, MASK > 0] = 0
    images = [inpaint(each, MASK, generator=seeded(), output_type="np").images for each in (given, other)]
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    ("steps", "jump_length", "jump_n_sample"), [(250, 10, 10), (50, 10, 3), (20, 3, 2), (5, 10, 10)]
)
def test_repaint_visits_the_levels_of_diffusers(steps, jump_length, jump_n_sample):
    stock = diffusers.RePaintScheduler(num_train_timesteps=1000)
    stock.set_timesteps(steps, jump_length, jump_n_sample)
    levels = repaint_levels(steps, jump_length, jump_n_sample)
    assert levels[-1] == steps
    assert [(steps - 1 - level) * (1000 // steps) for level in levels[:-1]] == stock.timesteps.tolist()


def filled_with(method, name, steps, **arguments):
    """The known image, its unknown pixels, what fills them 200 times, and the exact conditional distribution."""
    covariance, unknown = smooth_covariance(6), torch.zeros(6, 6, dtype=torch.bool)
    unknown[1:5, 2:] = True
    alpha_bar = scheduler().alpha_bar
    inpaint = editor(DDPMInpaintPipeline, 1, gaussian_network(covariance, alpha_bar), clip_sample=False)
    inpaint.use(name, steps)
    image = (torch.linalg.cholesky(covariance) @ torch.randn(36, generator=seeded(1), dtype=torch.float64)).clamp(
        -1, 1
    )
    given = (image / 2 + 0.5).float().view(1, 6, 6)
    images = inpaint([given] * 200, unknown, generator=seeded(), method=method, output_type="pt", **arguments).images
    m = unknown.flatten()
    gain = covariance[m][:, ~m] @ covariance[~m][:, ~m].inverse()
    exact = gain @ image[~m], covariance[m][:, m] - gain @ covariance[~m][:, m]
    return (images * 2 - 1).flatten(1)[:, m].double(), exact


@pytest.mark.slow
def test_fills_are_of_the_conditional_distribution():
    """Each method comes nearer to it than the one that is cheaper."""
    biases, spreads = {}, {}
    for method, name, steps, arguments in [
        ("replace", "unipc", 20, {}),
        ("posterior", "unipc", 20, {}),
        ("repaint", "ddpm", 50, {"jump_length": 5, "jump_n_sample": 10}),
    ]:
        fills, (mean, covariance) = filled_with(method, name, steps, **arguments)
        biases[method] = float((fills.mean(dim=0) - mean).square().mean().sqrt())
        spreads[method] = float(torch.cov(fills.T).trace() / covariance.trace())
    assert biases["posterior"] < biases["replace"] / 1.5
    assert biases["repaint"] < biases["replace"] / 1.5
    assert abs(math.log(spreads["posterior"])) < abs(math.log(spreads["replace"])) / 2
    assert abs(math.log(spreads["repaint"])) < math.log(1.5)


@pytest.mark.parametrize("name", UNTUNED_SCHEDULERS)
def test_images_near_strength_0_come_back_and_those_of_1_do_not(name):
    variation, given = editor(DDPMImg2ImgPipeline, prediction_type="v_prediction"), pictures()
    variation.use(name, 20)
    distances = []
    for strength in (0.001, 0.5, 1):
        images = variation(given, strength, generator=seeded(), output_type="np").images
        distances.append(float(np.abs(images - given / 255).mean()))
    assert distances[0] < 0.05
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", UNTUNED_SCHEDULERS)
def test_strength_1_samples_from_noise(name):
    """Of a schedule that leaves no signal in x_T: then nothing of the image is left, and the noise is all."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    variation = editor(DDPMImg2ImgPipeline, **settings).use(name, 10)
    edited = variation(pictures(), 1, generator=seeded(), output_type="pt").images
    sampled = DDPMPipeline.from_pipe(variation)(2, seeded(), output_type="pt").images
    torch.testing.assert_close(edited, sampled, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["unipc", "dpmsolver++", "ddim"])
@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_variations_keep_mean_and_spread_of_the_data(name, strength):
    """From x_0 of the data, x_t has its distribution, and what a network that is exact makes of it has that of x_0.

    In 50 steps `ddpm` does not keep the spread, whatever it begins with: its variance is exact for a single point.
    """
    covariance = 0.04 * torch.eye(64, dtype=torch.float64)
    variation = editor(DDPMImg2ImgPipeline, 1, gaussian_network(covariance, scheduler().alpha_bar), clip_sample=False)
    variation.use(name, T)
    given = (0.2 * torch.randn(64, 1, 8, 8, generator=seeded(1))).clamp(-1, 1) / 2 + 0.5
    images = variation(given, strength, generator=seeded(), output_type="pt").images * 2 - 1
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 0.2) < 0.02


@pytest.mark.parametrize("class_name", [name for name in EDITING_SCHEDULERS if name != "LCMScheduler"])
def test_other_schedulers_begin_where_diffusers_does(class_name):
    cls = getattr(diffusers, class_name)
    covariance = 0.04 * torch.eye(64, dtype=torch.float64)
    network = gaussian_network(covariance, scheduler().alpha_bar)
    variation = editor(DDPMImg2ImgPipeline, 1, network, clip_sample=False)
    config = {**variation.scheduler.config, "timestep_spacing": "leading", "variance_type": "fixed_small"}
    if "DDPM" not in class_name:
        del config["variance_type"]
    variation.scheduler = cls.from_config(config)
    seen = []
    given = (0.2 * torch.randn(64, 1, 8, 8, generator=seeded(1))).clamp(-1, 1) / 2 + 0.5
    images = variation(
        given,
        0.4,
        num_inference_steps=25,
        generator=seeded(),
        output_type="pt",
        callback_on_step_end=lambda pipeline, i, t, tensors: seen.append(int(t)),
    ).images
    if class_name != "DDPMScheduler":  # which becomes ours by its config alone, where the sampler is chosen
        stock = type("Stock", (), {"scheduler": cls.from_config(config)})()
        stock.scheduler.set_timesteps(25)
        expected, _ = StableDiffusionImg2ImgPipeline.get_timesteps(stock, 25, 0.4, "cpu")
        assert seen == expected.tolist()
    assert "DDPM" in class_name or abs(float((images * 2 - 1).std()) - 0.2) < 0.03


def test_default_is_20_steps_of_unipc_unless_use_says_otherwise():
    variation, steps = editor(DDPMImg2ImgPipeline), []

    def count(pipeline, i, t, tensors):
        steps.append(type(pipeline.scheduler).__name__)

    variation(pictures(1), 1, callback_on_step_end=count)
    assert steps == ["UniPCMultistepScheduler"] * 20
    assert variation.sampler is None
    assert type(variation.scheduler) is DDPMScheduler
    steps.clear()
    variation.use("ddpm", 4)(pictures(1), callback_on_step_end=count)
    assert steps == ["DDPMScheduler"] * 2
    assert variation.sampler == Sampler("ddpm", 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["posterior", "replace"])
def test_image_of_a_generator_does_not_depend_on_its_batch(method):
    given = pictures(3)
    for pipeline, arguments in (
        (editor(DDPMImg2ImgPipeline), {}),
        (editor(DDPMInpaintPipeline), {"mask_image": MASK, "method": method}),
    ):
        settings = {**arguments, "num_inference_steps": 4, "output_type": "pt"}
        together = pipeline(given, generator=[seeded(i) for i in range(3)], **settings).images
        for i in range(3):
            alone = pipeline(given[i], generator=[seeded(i)], **settings).images
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-3)


def test_classes_and_masks_may_be_one_for_each_image():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**smallest_unet_config(3, num_class_embeds=5)).eval()
    inpaint, given = editor(DDPMInpaintPipeline, unet=unet), np.repeat(pictures(1), 2, axis=0)
    edited = inpaint(
        given, [MASK, 255 - MASK], num_inference_steps=2, generator=[seeded(), seeded()], class_labels=[0, 3]
    ).images
    changed = [(np.array(image) != given[0]).any(axis=2) for image in edited]
    assert not changed[0][MASK == 0].any()
    assert not changed[1][MASK > 0].any()
    with pytest.raises(ValueError, match="class_labels must be given"):
        inpaint(given, MASK)


def test_callback_sees_and_replaces_each_step_and_may_interrupt():
    inpaint, seen = editor(DDPMInpaintPipeline), []

    def callback(pipeline, i, t, tensors):
        seen.append((i, tuple(tensors["latents"].shape)))
        pipeline._interrupt = i == 1
        return {"latents": torch.ones_like(tensors["latents"])}

    image = inpaint(pictures(1), MASK, num_inference_steps=5, callback_on_step_end=callback, output_type="np").images
    assert seen == [(0, (1, 3, 8, 8)), (1, (1, 3, 8, 8))]
    assert (image[0][MASK > 0] == 1).all()


def test_from_pipe_keeps_what_was_chosen_and_saves_a_plain_pipeline(tmp_path):
    plain = editor(DDPMPipeline)
    plain.save_pretrained(tmp_path / "plain")
    plain = DDPMPipeline.from_pretrained(tmp_path / "plain")
    plain.searched_timesteps = {("unipc", 3): SearchedTimesteps("unipc", (40, 20, 3), 0.1, 0.2, 4, 0, 100)}
    plain.kept_sampler = Sampler("ddim", 7)
    plain.use("unipc", 3)
    variation = DDPMImg2ImgPipeline.from_pipe(plain)
    assert variation.unet is plain.unet
    assert variation.sampler == Sampler("unipc", 3)
    assert variation.kept_sampler == Sampler("ddim", 7)
    seen = []
    variation(pictures(1), 1, callback_on_step_end=lambda pipeline, i, t, tensors: seen.append(int(t)))
    assert seen == [40, 20, 3]

    variation.save_pretrained(tmp_path / "edited")
    index = json.loads((tmp_path / "edited/model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "edited" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    stock: Any = StockPipeline.from_pretrained(tmp_path / "edited")
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(
        stock(generator=seeded(), num_inference_steps=3, output_type="np").images,
        DDPMPipeline(plain.unet, plain.scheduler)(generator=seeded(), num_inference_steps=3, output_type="np").images,
    )
    loaded = DDPMInpaintPipeline.from_pretrained(tmp_path / "edited")
    assert loaded.kept_sampler == Sampler("unipc", 3)


def test_from_pipe_leaves_the_type_of_the_weights():
    plain = editor(DDPMPipeline).to(torch.bfloat16)
    assert DDPMImg2ImgPipeline.from_pipe(plain).unet.dtype == torch.bfloat16


BAD = [
    ({"strength": 0}, r"strength must be in \(0, 1\], got 0"),
    ({"strength": 1.5}, r"strength must be in \(0, 1\], got 1.5"),
    ({"strength": "half"}, r"strength must be in \(0, 1\], got 'half'"),
    ({"num_inference_steps": 51}, r"num_inference_steps must be in \[1, 50\], got 51"),
    ({"output_type": "latent"}, "output_type must be 'pil', 'np' or 'pt', got 'latent'"),
    ({"class_labels": 1}, "class_labels must be None"),
    ({"generator": [seeded()]}, "a list of generators must hold batch_size = 2, got 1"),
    ({"method": "magic"}, "method must be one of posterior, replace, repaint, got 'magic'"),
    ({"method": "repaint", "jump_length": 0}, "jump_length must be a whole number of at least 1, got 0"),
    (
        {"method": "repaint", "num_inference_steps": 8},
        "jump_length must be less than the number of steps, 8, for method='repaint', got 10, so that",
    ),
    ({"method": "repaint", "strength": 0.5}, "strength must be 1 for method='repaint', got 0.5"),
    ({"mask_image": MASK * 0}, "mask_image must have white pixels"),
    ({"mask_image": MASK[:4]}, "mask_image must be 8 pixels high and 8 wide as the model's own, got 4 and 8"),
    ({"mask_image": [MASK] * 3}, "mask_image must be one mask, or one for each of 2 images, got 3"),
    ({"image": pictures(2, 3, 8, 6)}, r"image must be 8 pixels high and 8 wide .* got 8 and 6: resize it"),
    ({"image": "a.png"}, "image must be a PIL image, an array, a tensor or a list of them, got str"),
    ({"image": []}, "got an empty list"),
    ({"image": pictures()[0].astype(np.float32)}, r"image must have values in \[0, 1\], got 0 to 255|got \d"),
    ({"image": pictures(2, 1)}, "image must have the model's number of channels, 3, got 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_refused_before_the_network_is_evaluated(arguments, message):
    inpaint = editor(DDPMInpaintPipeline)
    inpaint.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match=message):
        inpaint(**{"image": pictures(), "mask_image": MASK, **arguments})


def test_schedulers_that_cannot_edit_are_named():
    inpaint = editor(DDPMInpaintPipeline)
    with pytest.raises(ValueError, match="method must be 'posterior' or 'replace' for UniPCMultistepScheduler"):
        inpaint.use("unipc", 4)(pictures(), MASK, method="repaint")
    inpaint.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(
        ValueError, match=r"must be one that edits images, got EulerDiscreteScheduler: call use\('unipc"
    ):
        inpaint(pictures(), MASK)
    inpaint.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="got FlowMatchEulerDiscreteScheduler: load a model with a beta_schedule"):
        inpaint(pictures(), MASK)
    inpaint.scheduler = scheduler()
    step_denoiser = editor(DDPMImg2ImgPipeline, prediction_type="previous_sample")
    with pytest.raises(ValueError, match="scheduler must be 'ddpm' for a step denoiser"):
        step_denoiser.use("unipc")
    with torch.inference_mode(), pytest.raises(ValueError, match="method must be 'replace' within"):
        editor(DDPMInpaintPipeline)(pictures(), MASK)
    assert named_scheduler("ddpm", inpaint.scheduler.config)
