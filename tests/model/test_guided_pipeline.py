"""Guided sampling: a Gaussian with a known answer, when the weaker network is evaluated, what is kept and refused."""

import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.guidance import Guidance, changed
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.solvers import named_scheduler
from tests.support.networks import smallest_unet_config

SPREAD, MEANS = 0.15, torch.tensor([0.1, -0.1, 0.0])
CLASSES = Classes(("above", "below"), has_unconditional=True)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Exact(diffusers.UNet2DModel):
    """The best prediction for images whose values are N(MEANS[class], SPREAD^2); it counts what it evaluates."""

    def use(self, scheduler: Any, means: torch.Tensor = MEANS) -> Any:
        self.scheduler, self.means, self.evaluated = scheduler, means, 0
        return self

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        self.evaluated += len(sample)
        t = torch.as_tensor(timestep).long()
        x_t, alpha_bar = sample.double(), self.scheduler.alpha_bar[t].view(-1, 1, 1, 1)
        mean = self.means.double()[class_labels].view(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * SPREAD**2 / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        x_0 = mean + gain * (x_t - alpha_bar.sqrt() * mean)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        target = self.scheduler.training_target(x_0, eps, t.expand(len(x_t)))
        variance = [torch.full_like(target, 0.3)] * (self.config.out_channels - self.config.in_channels)
        return UNet2DOutput(sample=torch.cat([target, *variance], dim=1).float())


def make_pipeline(name: str = "unipc", prediction_type: str = "v_prediction", **changes: Any) -> Any:
    scheduler = DDPMScheduler(
        100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
        **changes,
    )
    learned = scheduler.config.variance_type == "learned_range"
    config = smallest_unet_config(channels=1, num_class_embeds=3, sample_size=4, out_channels=2 if learned else 1)
    pipeline: Any = DDPMPipeline(Exact(**config).use(scheduler), named_scheduler(name, scheduler.config, 50))
    pipeline.classes = CLASSES
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def values(pipeline: Any, **arguments: Any) -> torch.Tensor:
    settings = {"class_labels": "above", "num_inference_steps": 50, "output_type": "pt", "batch_size": 64}
    return 2 * pipeline(generator=torch.Generator().manual_seed(0), **settings | arguments).images - 1


@pytest.mark.parametrize(
    ("name", "prediction_type", "variance_type"),
    [
        *((name, prediction, "fixed_small") for name in UNTUNED_SCHEDULERS for prediction in PREDICTIONS),
        ("ddpm", "previous_sample", "fixed_small"),
        ("ddpm", "v_prediction", "learned_range"),
        ("dpmsolver++", "epsilon", "learned_range"),
    ],
)
def test_guided_gaussian_has_the_extrapolated_mean_and_the_same_spread(name, prediction_type, variance_type):
    """The guided x_0_hat is the posterior mean of N(0 + w (0.1 - 0), SPREAD^2), at each noise level."""
    pipeline = make_pipeline(name, prediction_type, variance_type=variance_type)
    images = values(pipeline, guidance_scale=3.0)
    # 1,024 values. The chain is narrower in few steps, with guidance as without.
    assert float(images.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(images.std()) == pytest.approx(float(values(pipeline).std()), rel=0.01)
    assert float(values(pipeline, class_labels="below", guidance_scale=3.0).mean()) == pytest.approx(-0.3, abs=0.02)


@pytest.mark.parametrize("name", UNTUNED_SCHEDULERS)
def test_scale_one_is_no_guidance_and_no_second_evaluation(name):
    pipeline = make_pipeline(name)
    plain = values(pipeline)
    evaluated = pipeline.unet.evaluated
    assert torch.equal(values(pipeline, guidance_scale=1.0), plain)
    assert pipeline.unet.evaluated == 2 * evaluated == 2 * 50 * 64


def test_scale_zero_leads_to_the_images_without_class():
    pipeline = make_pipeline()
    assert torch.allclose(values(pipeline, guidance_scale=0.0), values(pipeline, class_labels=None), atol=1e-5)


@pytest.mark.slow
def test_interval_says_where_guidance_acts():
    pipeline = make_pipeline()
    everywhere, nowhere = values(pipeline, guidance_scale=2.0), values(pipeline)
    infinity = float("inf")
    assert torch.equal(values(pipeline, guidance_scale=2.0, guidance_interval=(0.0, infinity)), everywhere)
    pipeline.unet.evaluated = 0
    assert torch.equal(values(pipeline, guidance_scale=2.0, guidance_interval=(1e-9, 1e-8)), nowhere)
    assert pipeline.unet.evaluated == 50 * 64
    # The list of 50 timesteps has as many above sigma = 1 as below: alpha_bar is 1/2 in the middle of the cosine.
    pipeline.unet.evaluated = 0
    between = values(pipeline, guidance_scale=2.0, guidance_interval=(1.0, infinity))
    assert 70 * 64 < pipeline.unet.evaluated < 80 * 64
    assert nowhere.mean() < between.mean() < everywhere.mean()


def test_autoguidance_leads_away_from_the_weaker_network():
    """The weaker network takes every class for 0.06: the guided mean is 0.06 + 2 (0.1 - 0.06)."""
    pipeline = make_pipeline()
    pipeline.guide = make_pipeline().unet.use(pipeline.unet.scheduler, torch.full((3,), 0.06))
    assert float(values(pipeline, guidance_scale=2.0).mean()) == pytest.approx(0.14, abs=0.02)
    assert pipeline.guide.evaluated == pipeline.unet.evaluated == 50 * 64


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_autoguidance_beside_guidance_by_the_class_adds_to_it(prediction_type):
    """The mean is 0.1 + 2 (0.1 - 0) of the network without a class + (0.1 - 0.06) of the weaker one."""
    pipeline = make_pipeline(prediction_type=prediction_type)
    pipeline.guide = make_pipeline(prediction_type=prediction_type).unet
    pipeline.guide.use(pipeline.unet.scheduler, torch.full((3,), 0.06))
    images = values(pipeline, guidance=Guidance(3.0, autoguidance_scale=2.0))
    assert float(images.mean()) == pytest.approx(0.34, abs=0.02)
    assert (pipeline.unet.evaluated, pipeline.guide.evaluated) == (2 * 50 * 64, 50 * 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfg", "apg"])
def test_autoguidance_acts_outside_the_interval_too(method):
    """An interval without a timestep leaves autoguidance alone."""
    pipeline = make_pipeline()
    pipeline.guide = make_pipeline().unet.use(pipeline.unet.scheduler, torch.full((3,), 0.06))
    alone = values(pipeline, guidance_scale=2.0)
    pipeline.unet.evaluated = pipeline.guide.evaluated = 0
    guidance = Guidance(3.0, (1e-9, 1e-8), method=method, autoguidance_scale=2.0)
    assert torch.allclose(values(pipeline, guidance=guidance), alone, atol=1e-5)
    assert pipeline.unet.evaluated == pipeline.guide.evaluated == 50 * 64
    between = values(pipeline, guidance=replace(guidance, interval=(1.0, float("inf"))))
    assert 120 * 64 < pipeline.unet.evaluated < 130 * 64
    assert alone.mean() < between.mean()


@pytest.mark.parametrize("method", ["cfg", "cfg-zero*", "apg", "tcfg"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_guided_image_does_not_depend_on_its_batch(method, prediction_type):
    guidance = Guidance(2.0, (0.0, 5.0), method=method, rescale=0.5)
    pipeline = make_pipeline("ddim", prediction_type)

    def sample(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        labels = [seed % 2 for seed in seeds]
        settings = {"num_inference_steps": 10, "output_type": "pt", "guidance": guidance}
        return pipeline(len(seeds), generators, class_labels=labels, **settings).images

    together = sample([0, 1, 2])
    assert together.isfinite().all()
    assert torch.allclose(together, torch.cat([sample([seed]) for seed in range(3)]), atol=1e-5)


@pytest.mark.slow
def test_apg_acts_on_x_0_hat_whatever_the_network_predicts():
    """It depends on norms and angles, so the same images prove that it is given the same quantity."""
    guidance = Guidance(3.0, method="apg", norm_threshold=0.2)
    images = [values(make_pipeline("ddim", prediction), guidance=guidance) for prediction in PREDICTIONS]
    assert torch.allclose(images[0], images[1], atol=1e-3)
    assert torch.allclose(images[0], images[2], atol=1e-3)
    assert not torch.allclose(images[0], values(make_pipeline("ddim"), guidance_scale=3.0), atol=1e-2)


def test_chosen_guidance_is_kept_with_the_model(tmp_path, make_unet):
    unet = make_unet(channels=1, num_class_embeds=3)
    pipeline = DDPMPipeline(unet, DDPMScheduler(50, beta_schedule="squaredcos_cap_v2"))
    pipeline.classes = CLASSES
    pipeline.use("ddim", 5, guidance_scale=2.0, guidance_interval=(0.3, float("inf"))).save_pretrained(tmp_path)
    loaded: Any = DDPMPipeline.from_pretrained(tmp_path).use()
    assert loaded.sampler.guidance == Guidance(2.0, (0.3, float("inf")))
    loaded.set_progress_bar_config(disable=True)

    def image(**arguments: Any) -> torch.Tensor:
        settings = {"class_labels": 1, "output_type": "pt"}
        return loaded(generator=torch.Generator().manual_seed(0), **settings | arguments).images

    kept = image()
    assert torch.equal(kept, image(guidance_scale=2.0, guidance_interval=(0.3, 1e9)))
    assert not torch.equal(kept, image(guidance_scale=1.0))
    assert loaded.use(guidance_scale=1.0).sampler.guidance is None
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {"unet", "scheduler"}


def test_unconditional_model_is_guided_by_the_network_in_its_folder(tmp_path, make_unet):
    scheduler = DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(make_unet(channels=1), scheduler).save_pretrained(tmp_path)
    pipeline: Any = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "output_type": "pt"}
    with pytest.raises(ValueError, match=r"guidance needs a weaker model, got .* without a folder 'guide'"):
        pipeline(guidance_scale=2.0)
    make_unet(channels=1, seed=1).save_pretrained(tmp_path / "guide")
    guided = pipeline(generator=torch.Generator().manual_seed(0), guidance_scale=2.0, **settings).images
    pipeline.guide = make_unet(channels=1, seed=1)
    again = pipeline(generator=torch.Generator().manual_seed(0), guidance_scale=2.0, **settings).images
    assert torch.equal(guided, again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance scale must be finite and at least 0, got -1.0"),
        ({"guidance_scale": 2.0, "guidance_interval": (2.0, 1.0)}, "guidance interval must be"),
        ({"guidance_interval": (1.0, 2.0)}, "interval takes effect only with guidance"),
        ({"guidance_scale": 2.0, "guidance": Guidance(2.0)}, "guidance must be given without guidance_scale"),
        ({"guidance_scale": 2.0, "class_labels": None}, "guidance needs class_labels, got none"),
        (
            {"guidance": Guidance(2.0, autoguidance_scale=2.0)},
            "guidance needs a weaker model, got a pipeline",
        ),
    ],
)
def test_guidance_that_cannot_work_is_refused_before_the_first_evaluation(arguments, message):
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=message):
        values(pipeline, **arguments)
    assert pipeline.unet.evaluated == 0


def test_autoguidance_beside_guidance_needs_classes(make_unet):
    pipeline: Any = DDPMPipeline(make_unet(channels=1), DDPMScheduler(50, beta_end=0.5))
    pipeline.guide = make_unet(channels=1, seed=1)
    message = (
        "autoguidance_scale goes beside guidance by classes, got 2 for a model that .*: give autoguidance_scale=1"
    )
    with pytest.raises(ValueError, match=message):
        pipeline(guidance=Guidance(2.0, autoguidance_scale=2.0))
    with pytest.raises(ValueError, match=message):
        pipeline.use(guidance_scale=2.0, autoguidance_scale=2.0)


@pytest.mark.slow
def test_autoguidance_beside_guidance_changes_no_other_call(tmp_path, make_unet):
    """Neither a call nor saving puts the weaker network in the place of guidance by the class."""
    pipeline: Any = DDPMPipeline(make_unet(channels=1, num_class_embeds=3), DDPMScheduler(50, beta_end=0.5))
    pipeline.classes = CLASSES
    pipeline.save_pretrained(tmp_path / "model")
    loaded: Any = DDPMPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"guidance needs a weaker model, got .* without a folder 'guide'"):
        loaded.use("ddim", 4, guidance_scale=2.0, autoguidance_scale=1.5)
    make_unet(channels=1, num_class_embeds=3, seed=1).save_pretrained(tmp_path / "model/guide")
    loaded.use("ddim", 4)
    loaded.set_progress_bar_config(disable=True)

    def image(**arguments: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return loaded(generator=generator, class_labels=1, output_type="pt", **arguments).images

    by_class = image(guidance_scale=2.0)
    by_both = image(guidance=Guidance(2.0, autoguidance_scale=1.5))
    assert not torch.equal(by_class, by_both)
    assert torch.equal(image(guidance_scale=2.0), by_class)
    loaded.use("ddim", 4, guidance_scale=2.0, autoguidance_scale=1.5).save_pretrained(tmp_path / "kept")
    assert torch.equal(image(), by_both)
    assert torch.equal(image(guidance=Guidance(2.0)), by_class)
    loaded.use("ddim", 4, guidance_scale=2.0, autoguidance_scale=1.0)
    assert torch.equal(image(), by_class)
    loaded = DDPMPipeline.from_pretrained(tmp_path / "kept").use()
    assert (loaded.sampler.guidance, loaded.sampler.uses_guide) == (Guidance(2.0, autoguidance_scale=1.5), False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(image(), by_both)
    with pytest.raises(ValueError, match=r"guidance needs class_labels, got none, .*: give a class, or guid"):
        loaded()


def test_guide_of_other_images_is_refused(make_unet):
    pipeline = make_pipeline()
    pipeline.guide = make_unet(channels=1, num_class_embeds=3)
    with pytest.raises(ValueError, match="guide must have the model's sample_size, 4, got 8"):
        values(pipeline, guidance_scale=2.0)


def test_flow_matching_is_guided_in_an_interval(make_unet):
    """There sigma is the share of the noise over that of the image."""
    pipeline: Any = DDPMPipeline(make_unet(channels=1), diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guide = make_unet(channels=1, seed=1)
    calls = []
    pipeline.guide.register_forward_hook(lambda *_: calls.append(1))
    settings = {"num_inference_steps": 10, "output_type": "pt", "guidance_scale": 2.0}
    pipeline(guidance_interval=(1.0, float("inf")), **settings)
    steps = pipeline.scheduler.timesteps
    assert len(calls) == int((steps / (1000 - steps) > 1).sum())
    with pytest.raises(ValueError, match="'apg' needs a model with a beta_schedule, got FlowMatchEuler"):
        pipeline(num_inference_steps=10, guidance=Guidance(2.0, method="apg"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["posterior", "replace"])
def test_editing_is_guided_too(method):
    """From pure noise, image to image samples the guided Gaussian, and so are the pixels that are repainted."""
    pipeline = make_pipeline("unipc")
    gray = torch.full((64, 1, 4, 4), 0.5)
    settings = {"num_inference_steps": 50, "output_type": "pt", "class_labels": "above", "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(0)
    drawn = 2 * DDPMImg2ImgPipeline.from_pipe(pipeline)(gray, 1.0, generator=generator, **settings).images - 1
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.02)
    mask = torch.arange(4).repeat(4, 1)[None] < 2
    inpaint = DDPMInpaintPipeline.from_pipe(pipeline)
    filled = inpaint(gray, mask, generator=generator, method=method, **settings).images
    assert torch.equal(filled[..., 2:], gray[..., 2:])
    assert float(2 * filled[..., :2].mean() - 1) == pytest.approx(0.3, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("autoguidance_scale", [None, 1.5])
def test_saved_pipeline_keeps_the_guide_that_its_guidance_needs(autoguidance_scale, tmp_path, make_unet):
    """Also of a model of classes, which could guide itself; and nothing in its folder is no JSON."""
    pipeline: Any = DDPMPipeline(make_unet(channels=1, num_class_embeds=3), DDPMScheduler(50, beta_end=0.5))
    pipeline.classes = CLASSES
    pipeline.guide = make_unet(channels=1, num_class_embeds=3, seed=1)
    infinity = float("inf")
    chosen = {"guidance_scale": 2.0, "guidance_interval": (0.1, infinity), "autoguidance_scale": autoguidance_scale}
    pipeline.use("ddim", 4, **chosen).save_pretrained(tmp_path / "first")
    # Saved again without its having been needed, it is still there.
    DDPMPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    loaded: Any = DDPMPipeline.from_pretrained(tmp_path / "second").use()
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
    settings = {"class_labels": 1, "output_type": "pt"}
    images = [each(generator=torch.Generator().manual_seed(0), **settings).images for each in (pipeline, loaded)]
    assert torch.equal(*images)
    assert loaded.sampler == pipeline.sampler._replace(uses_guide=autoguidance_scale is None)
    for path in (tmp_path / "second").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("content", ["{", None])
def test_damaged_guide_is_named(tmp_path, make_unet, content):
    DDPMPipeline(make_unet(channels=1), DDPMScheduler(50, beta_end=0.5)).save_pretrained(tmp_path)
    unet = make_unet(channels=1)
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    unet.save_pretrained(tmp_path / "guide")
    if content is not None:
        (tmp_path / "guide/config.json").write_text(content)
    message = (
        "the folder 'guide' of .* must have finite weights"
        if content is None
        else "the folder 'guide' of .* must hold"
    )
    with pytest.raises(ValueError, match=message):
        DDPMPipeline.from_pretrained(tmp_path)(guidance_scale=2.0)


def test_no_step_of_a_call_is_kept_by_the_pipeline():
    pipeline = DDPMInpaintPipeline.from_pipe(make_pipeline("ddim"))
    mask = torch.arange(4).repeat(4, 1)[None] < 2
    guidance = Guidance(2.0, method="apg")
    settings = {"num_inference_steps": 3, "output_type": "pt", "class_labels": "above", "guidance": guidance}
    pipeline(torch.full((2, 1, 4, 4), 0.5), mask, **settings)
    assert not pipeline._running.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": "2"}, "guidance scale must be a number, got '2'"),
        ({"guidance": 2.0}, "guidance must be a Guidance, got 2.0: guidance_scale takes a number"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.2,)}, r"must be two numbers, \(low, high\), got \(0.2,\)"),
        ({"guidance_scale": 2.0, "guidance_interval": 3.0}, "must be two numbers"),
    ],
)
def test_guidance_of_a_wrong_type_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        values(make_pipeline(), **arguments)


def test_guide_that_is_a_pipeline_is_refused():
    pipeline = make_pipeline()
    pipeline.guide = make_pipeline()
    with pytest.raises(ValueError, match="guide must be a network, got DDPMPipeline: give its unet"):
        values(pipeline, guidance_scale=2.0)


def test_what_a_call_gives_replaces_that_part_of_kept_guidance():
    kept = Guidance(2.0, (0.2, 3.0), method="apg", norm_threshold=5.0)
    assert changed(kept) is not None
    assert changed(kept, 3.0) == replace(kept, scale=3.0)
    assert changed(kept, interval=(1.0, 2.0)) == replace(kept, interval=(1.0, 2.0))
    assert changed(kept, method="cfg") == Guidance(2.0, (0.2, 3.0))
    assert changed(kept, 1.0) is None
    assert changed(None) is None
    assert changed(None, 2.0) == Guidance(2.0)
    with pytest.raises(ValueError, match="interval takes effect only with guidance"):
        changed(None, interval=(1.0, 2.0))
