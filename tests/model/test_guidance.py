"""Formulas of guidance: diffusers' guiders, a Gaussian with a known answer, and what holds for each formula."""

import math
from typing import get_args

import pytest
import torch
from diffusers import guiders
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.utils import logging

from hf_ddpm.guidance import (
    Guidance,
    GuidanceMethod,
    adaptive_projected,
    combine,
    guide,
    in_interval,
    rescale,
    tangential,
    zero_star,
)
from hf_ddpm.names import GUIDANCE_METHODS
from hf_ddpm.scheduler import DDPMScheduler

SHAPES = [(3, 3, 8, 8), (2, 1, 5, 7), (1, 4, 1, 3)]
SCALES = [0.0, 0.5, 1.5, 7.5]


@pytest.fixture(autouse=True)
def silent_guiders():
    """Each guider warns in diffusers' log that it is experimental."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def two_predictions(shape, seed=0, dtype=torch.float32):
    """Return a prediction and a weaker one, which resembles it as that of a network does."""
    generator = torch.Generator().manual_seed(seed)
    prediction, difference = (torch.randn(shape, generator=generator) for _ in range(2))
    return prediction.to(dtype), (0.8 * prediction + 0.5 * difference).to(dtype)


def projected(prediction, weaker, scale):
    """Guide by APG with each of its parts, after a step whose running difference was not 0."""
    running = torch.linspace(-1, 1, prediction[0].numel()).view(prediction[0].shape).expand(prediction.shape)
    return adaptive_projected(prediction, weaker, scale, running, norm_threshold=2.0)[0]


def rescaled(prediction, weaker, scale):
    return combine(Guidance(scale=scale, rescale=0.7), prediction, weaker)[0]


FORMULAS = [guide, zero_star, tangential, projected]


# Equality with diffusers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("formula", "guider"),
    [
        (guide, guiders.ClassifierFreeGuidance),
        (zero_star, guiders.ClassifierFreeZeroStarGuidance),
        (tangential, guiders.TangentialClassifierFreeGuidance),
    ],
)
def test_formulas_equal_diffusers_guiders(formula, guider, scale, shape):
    prediction, weaker = two_predictions(shape)
    theirs = guider(guidance_scale=scale)
    theirs.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500))  # past CFG-Zero*'s first step
    # TCFG's singular value decomposition in float32 is off by 5e-5 here.
    torch.testing.assert_close(
        formula(prediction, weaker, scale), theirs.forward(prediction, weaker).pred, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("eta", "norm_threshold", "momentum"), [(0.0, 2.0, -0.5), (0.3, math.inf, -0.75), (1, 1, 0)])
def test_adaptive_projected_equals_diffusers_guider_in_each_step(eta, norm_threshold, momentum, scale, shape):
    """diffusers' "original formulation" is the paper's for a scale that is less by 1; a threshold of 0 is none."""
    theirs = guiders.AdaptiveProjectedGuidance(
        guidance_scale=scale - 1,
        adaptive_projected_guidance_rescale=0.0 if norm_threshold == math.inf else norm_threshold,
        eta=eta,
        use_original_formulation=True,
    )
    theirs.momentum_buffer = MomentumBuffer(momentum)
    running = None
    for seed in range(3):
        prediction, weaker = two_predictions(shape, seed)
        guided, running = adaptive_projected(
            prediction, weaker, scale, running, eta=eta, norm_threshold=norm_threshold, momentum=momentum
        )
        torch.testing.assert_close(guided, theirs.forward(prediction, weaker).pred)
    torch.testing.assert_close(running, theirs.momentum_buffer.running_average)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0])
def test_rescale_equals_diffusers_guider(factor, shape):
    prediction, weaker = two_predictions(shape)
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=factor)
    torch.testing.assert_close(
        rescale(guide(prediction, weaker, 4.0), prediction, factor), theirs.forward(prediction, weaker).pred
    )


# A known answer


@pytest.mark.parametrize("t", [50, 400, 900])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guide_of_exact_predictions_is_the_exact_prediction_of_the_product(prediction_type, scale, t):
    """Let x_0 be N(0, S^2), and N(mu, s^2) in the class c: p(x_t)^(1-w) p(x_t | c)^w is a Gaussian, too.

    Each network's output comes from E[x_0 | x_t], the expected eps from the score of the product.
    """
    wide, narrow, mu = 1.5, 0.4, 0.7
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    signal, noise_variance = scheduler.alpha_bar[t].sqrt(), 1 - scheduler.alpha_bar[t]
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3).requires_grad_()

    def marginal(mean, std):
        return torch.distributions.Normal(signal * mean, (signal**2 * std**2 + noise_variance).sqrt())

    def exact_output(mean, std):
        x_0 = mean + std**2 * signal / marginal(mean, std).variance * (x_t - signal * mean)
        eps = (x_t - signal * x_0) / noise_variance.sqrt()
        return scheduler.training_target(x_0, eps, t)

    guided = guide(exact_output(mu, narrow), exact_output(0, wide), scale)
    log_product = scale * marginal(mu, narrow).log_prob(x_t) + (1 - scale) * marginal(0, wide).log_prob(x_t)
    (score,) = torch.autograd.grad(log_product.sum(), x_t)
    torch.testing.assert_close(scheduler.predict_noise(guided, x_t, t), -noise_variance.sqrt() * score)


# What holds for each formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formula", FORMULAS)
def test_scale_1_returns_the_prediction_to_the_last_bit(formula, dtype):
    prediction, weaker = two_predictions((2, 3, 8, 8), dtype=dtype)
    assert torch.equal(formula(prediction, 3 * weaker, 1.0), prediction)
    assert torch.equal(formula(prediction, 3 * weaker, 1), prediction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formula", [*FORMULAS, rescaled])
def test_half_precision_is_computed_in_float32_and_rounded_once(formula, dtype):
    prediction, weaker = two_predictions((2, 3, 8, 8), dtype=dtype)
    guided = formula(prediction, weaker, 4.0)
    assert guided.dtype == dtype
    assert torch.equal(guided, formula(prediction.float(), weaker.float(), 4.0).to(dtype))


def test_running_difference_of_half_precision_is_float32():
    prediction, weaker = two_predictions((2, 3, 8, 8), dtype=torch.bfloat16)
    assert adaptive_projected(prediction, weaker, 4.0)[1].dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 1, 5, 7), (3, 2, 1, 1), (3, 1, 1, 1)])
@pytest.mark.parametrize("formula", [*FORMULAS, rescaled])
def test_each_image_of_a_batch_is_guided_as_if_it_were_alone(formula, shape):
    prediction, weaker = two_predictions(shape)
    size = torch.logspace(-2, 2, shape[0]).view(-1, 1, 1, 1)  # a norm over the batch would be that of the last image
    prediction, weaker = size * prediction, size * weaker
    alone = [formula(prediction[i : i + 1], weaker[i : i + 1], 4.0) for i in range(shape[0])]
    torch.testing.assert_close(formula(prediction, weaker, 4.0), torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("formula", [*FORMULAS, rescaled])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (2, 1, 1, 1)])
def test_degenerate_predictions_give_finite_results(formula, shape):
    prediction, weaker = two_predictions(shape)
    zeros, constant = torch.zeros(shape), torch.full(shape, 0.1)
    predictions = (prediction, weaker, zeros, constant, 2 * constant, -prediction, 1e-30 * prediction)
    for first in predictions:
        for second in predictions:
            guided = formula(first, second, 4.0)
            assert guided.isfinite().all()
            assert guided.abs().max() <= 8 * max(first.abs().max(), second.abs().max(), 1)


@pytest.mark.parametrize("formula", [guide, tangential, zero_star])
def test_equal_predictions_need_no_guidance(formula):
    prediction, _ = two_predictions((2, 3, 8, 8))
    torch.testing.assert_close(formula(prediction, prediction, 4.0), prediction)


# Each formula by itself


def test_rescale_gives_the_std_of_the_prediction():
    prediction, weaker = two_predictions((3, 3, 8, 8))
    guided = guide(prediction, weaker, 4.0)
    std = prediction.flatten(1).std(dim=1)
    torch.testing.assert_close(rescale(guided, prediction, 1.0).flatten(1).std(dim=1), std)
    assert torch.equal(rescale(guided, prediction, 0.0), guided)
    assert torch.equal(rescale(prediction, prediction, 0.7), prediction)


def test_rescale_leaves_a_constant_image():
    """The mean of many equal values is rounded, so that a std that is computed plainly is tiny and not 0."""
    prediction, _ = two_predictions((1, 3, 7, 9))
    constant = torch.full_like(prediction, 0.1)
    assert torch.equal(rescale(constant, prediction, 0.7), constant)


def test_zero_star_ignores_the_size_of_the_weaker_prediction():
    """s* weaker is the projection of the prediction on the weaker one: what is left is orthogonal to it."""
    prediction, weaker = two_predictions((3, 3, 8, 8))
    guided = zero_star(prediction, weaker, 4.0)
    torch.testing.assert_close(zero_star(prediction, -5 * weaker, 4.0), guided)
    inner = ((guided - prediction) * weaker).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, torch.zeros(3), rtol=0, atol=1e-3)


def test_tangential_filter_is_the_first_singular_vector():
    """At scale 0 the result is the filtered prediction: weaker V V^T with the first right singular vector V."""
    prediction, weaker = two_predictions((3, 2, 4, 4), dtype=torch.float64)
    weaker = 2 * weaker  # the larger of the two
    first = torch.linalg.svd(torch.stack([prediction, weaker], dim=1).flatten(2), full_matrices=False)[2][:, :1]
    filtered = (weaker.flatten(1)[:, None] @ first.mT @ first).view(weaker.shape)
    torch.testing.assert_close(tangential(prediction, weaker, 0.0), filtered)


def test_adaptive_projected_is_plain_guidance_without_its_three_parts():
    prediction, weaker = two_predictions((3, 3, 8, 8))
    guided, running = adaptive_projected(prediction, weaker, 4.0, torch.ones(3, 3, 8, 8), eta=1.0, momentum=0.0)
    torch.testing.assert_close(guided, guide(prediction, weaker, 4.0))
    torch.testing.assert_close(running, prediction - weaker)


def test_adaptive_projected_moves_orthogonally_by_a_bounded_distance():
    prediction, weaker = two_predictions((3, 3, 8, 8))
    moved = adaptive_projected(prediction, weaker, 4.0, norm_threshold=0.5)[0] - prediction
    inner = (moved * prediction).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, torch.zeros(3), rtol=0, atol=1e-3)
    assert (moved.flatten(1).norm(dim=1) <= 3 * 0.5 + 1e-5).all()


def test_in_interval_is_open_below_and_closed_above():
    assert [in_interval(sigma, 0.5, 2.0) for sigma in (0.4, 0.5, 0.51, 2.0, 2.1)] == [False, False, True, True, False]
    assert in_interval(math.inf, 0.0, math.inf)  # without signal in x_T
    assert not in_interval(0.0, 0.0, math.inf)


# How a pipeline guides


@pytest.mark.parametrize(("method", "formula"), [("cfg", guide), ("cfg-zero*", zero_star), ("tcfg", tangential)])
def test_combine_is_the_formula_of_the_method(method, formula):
    prediction, weaker = two_predictions((2, 3, 8, 8))
    guided, running = combine(Guidance(scale=4.0, rescale=0.7, method=method), prediction, weaker)
    assert torch.equal(guided, rescale(formula(prediction, weaker, 4.0), prediction, 0.7))
    assert running is None


def test_combine_hands_the_running_difference_on():
    guidance, running, other_running = Guidance(scale=4.0, method="apg", norm_threshold=2.0), None, None
    for seed in range(3):
        prediction, weaker = two_predictions((2, 3, 8, 8), seed)
        guided, running = combine(guidance, prediction, weaker, running)
        expected, other_running = adaptive_projected(prediction, weaker, 4.0, other_running, norm_threshold=2.0)
        assert torch.equal(guided, expected)
        assert torch.equal(running, other_running)


def test_guidance_methods_are_named_once():
    assert get_args(GuidanceMethod) == GUIDANCE_METHODS


def test_guidance_is_none_by_default():
    prediction, weaker = two_predictions((2, 3, 8, 8))
    assert torch.equal(combine(Guidance(), prediction, weaker)[0], prediction)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.0, "interval": (0.0, math.inf)},
        {"scale": 2, "interval": (0.3, 5), "rescale": 1},
        {"scale": 15.0, "method": "apg"},
        {"scale": 2.0, "autoguidance_scale": 1.5},
        {"scale": 15.0, "method": "apg", "norm_threshold": 2.5, "rescale": 0.7},
    ],
)
def test_guidance_takes_settings_that_take_effect(settings):
    guidance = Guidance(**settings)
    assert all(getattr(guidance, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, r"scale must be finite and at least 0, got -1\.0: 1 is no guidance"),
        ({"scale": math.inf}, "scale must be finite and at least 0, got inf"),
        ({"scale": math.nan}, "scale must be finite and at least 0, got nan"),
        ({"scale": 2, "interval": (2.0, 1.0)}, r"0 <= low < high, got \(2\.0, 1\.0\): give two values of sigma"),
        ({"scale": 2, "interval": (1.0, 1.0)}, "0 <= low < high"),
        ({"scale": 2, "interval": (-1.0, 1.0)}, "0 <= low < high"),
        ({"scale": 2, "interval": (0.0, math.nan)}, "0 <= low < high"),
        ({"scale": 2, "rescale": 1.1}, r"rescale must be in \[0, 1\], got 1\.1: 0 leaves it out"),
        ({"scale": 2, "rescale": -0.1}, r"rescale must be in \[0, 1\], got -0\.1"),
        ({"scale": 2, "method": "pag"}, r"method must be one of cfg, cfg-zero\*, apg, tcfg, got 'pag'"),
        ({"scale": 2, "method": "apg", "norm_threshold": 0.0}, r"norm_threshold must be above 0, got 0\.0: math.inf"),
        ({"scale": 2, "norm_threshold": 2.5}, "norm_threshold takes effect only with method='apg', got .*'cfg'"),
        ({"rescale": 0.7}, "rescale takes effect only with guidance, got rescale=0.7 with scale=1: give guidance"),
        ({"method": "tcfg"}, "method takes effect only with guidance, got method='tcfg' with scale=1"),
        ({"autoguidance_scale": 1.5}, "^autoguidance_scale takes effect only with guidance, got autoguidance_scale=1"),
        ({"scale": 2, "autoguidance_scale": -1}, "autoguidance_scale must be finite and at least 0, got -1: 1 is no"),
        ({"scale": 2, "autoguidance_scale": "2"}, "^autoguidance_scale must be a number, got '2'"),
        ({"interval": (0.3, 5.0)}, r"interval takes effect only with guidance, got interval=\(0\.3, 5\.0\)"),
    ],
)
def test_guidance_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)
