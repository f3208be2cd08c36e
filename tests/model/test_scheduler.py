"""The formulas of q and p, against independent float64 values and analytic cases."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ddpm.bound import variational_bound
from hf_ddpm.scheduler import DDPMScheduler

REFERENCE = json.loads((Path(__file__).parents[1] / "support/gaussian_diffusion_reference.json").read_text())
SCHEDULES: dict[str, Any] = {"linear/1000": "linear", "cosine/1000": "squaredcos_cap_v2"}
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "previous_sample"]
# (dtype, relative and absolute error). A float32 value near 1 that is a difference carries 1e-7 of its parts.
# The reference is printed to 12 digits, x_t among them.
PRECISIONS = [(torch.float64, 1e-10, 2e-12), (torch.float32, 1e-6, 1e-7)]


def reference_inputs(dtype):
    i, k = np.arange(36), REFERENCE["inputs"]["k"]
    arrays = (
        np.round((np.sin(0.37 * i + k) + 1) * 127.5) / 127.5 - 1,
        1.3 * np.cos(0.73 * i + 2 * k),
        0.9 * np.sin(1.11 * i + 3 * k),
        0.8 * np.cos(0.29 * i + k),
    )
    return [torch.tensor(a.reshape(6, 1, 2, 3), dtype=dtype) for a in arrays]


def images_of(values):
    return torch.tensor(values, dtype=torch.float64).reshape(6, 1, 2, 3)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), PRECISIONS)
@pytest.mark.parametrize("name", SCHEDULES)
class TestReference:
    def test_forward_process_and_posterior(self, name, dtype, rtol, atol):
        values, (x_0, eps, _, _) = REFERENCE["schedules"][name], reference_inputs(dtype)
        scheduler, t = DDPMScheduler(beta_schedule=SCHEDULES[name]), torch.tensor(values["t"])
        torch.testing.assert_close(scheduler.beta[t].tolist(), values["betas"], rtol=1e-10, atol=0)
        torch.testing.assert_close(scheduler.alpha_bar[t].tolist(), values["alphas_cumprod"], rtol=1e-10, atol=0)
        x_t = scheduler.add_noise(x_0, eps, t)
        assert x_t.dtype == dtype
        torch.testing.assert_close(x_t.double(), images_of(values["x_t"]), rtol=rtol, atol=atol)
        mean, variance, log_variance = scheduler.posterior(x_0, images_of(values["x_t"]).to(dtype), t)
        torch.testing.assert_close(mean.double(), images_of(values["posterior_mean"]), rtol=rtol, atol=atol)
        for got, key in ((variance, "posterior_variance"), (log_variance, "posterior_log_variance_clipped")):
            expected = torch.tensor(values[key], dtype=torch.float64).view(6, 1, 1, 1).expand(6, 1, 2, 3)
            torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=0)

    def test_reverse_distribution(self, name, dtype, rtol, atol):
        reference, (x_0, _, output, variance_output) = REFERENCE["schedules"][name], reference_inputs(dtype)
        t, x_t = torch.tensor(reference["t"]), images_of(reference["x_t"]).to(dtype)
        for case, expected in reference["p"].items():
            prediction_type, variance_type, clip = case.split("/")
            scheduler = DDPMScheduler(
                beta_schedule=SCHEDULES[name],
                prediction_type=prediction_type,
                variance_type=variance_type,
                clip_sample=clip == "clip=True",
            )
            learned = variance_type.startswith("learned")
            model_output = torch.cat([output, variance_output], dim=1) if learned else output
            got = scheduler.reverse_distribution(model_output, x_t, t)
            for tensor, key in zip(got, ("mean", "log_variance", "pred_x_0"), strict=True):
                torch.testing.assert_close(
                    tensor.double(), images_of(expected[key]), rtol=rtol, atol=2 * atol, msg=case
                )
            bound = variational_bound(scheduler, model_output, x_0, x_t, t)
            expected_bound = torch.tensor(expected["vlb_bits_per_dim"], dtype=torch.float64)
            torch.testing.assert_close(bound.double(), expected_bound, rtol=20 * rtol, atol=atol, msg=case)


def test_log_variance_types_are_the_same_distribution():
    t, x_t = torch.tensor([0, 1, 500, 999]), torch.randn(4, 1, 2, 2)
    pairs: Any = (("fixed_small", "fixed_small_log"), ("fixed_large", "fixed_large_log"))
    for variance_types in pairs:
        plain, log = (
            DDPMScheduler(variance_type=variance_type).reverse_distribution(x_t, x_t, t)[1]
            for variance_type in variance_types
        )
        assert torch.equal(plain, log)


@pytest.mark.slow
def test_forward_steps_have_the_moments_of_the_closed_form():
    """An image carried through all T steps has the closed form's mean and variance at each of them."""
    generator = torch.Generator().manual_seed(0)
    scheduler = DDPMScheduler()
    count, x_0 = 20_000, 0.7
    x = torch.full((count, 1, 1, 1), x_0)
    for t in range(1000):
        x = scheduler.forward_step(x, torch.randn(x.shape, generator=generator), t)
        if t in (0, 9, 99, 499, 999):
            mean, std = (scheduler.alpha_bar[t].sqrt() * x_0).item(), (1 - scheduler.alpha_bar[t]).sqrt().item()
            assert abs(x.mean().item() - mean) < 4 * std / count**0.5
            assert abs(x.std().item() / std - 1) < 4 / (2 * count) ** 0.5


def test_forward_steps_without_noise_equal_the_closed_form():
    x_0, scheduler = torch.randn(2, 1, 4, 4, dtype=torch.float64), DDPMScheduler()
    x = x_0
    for t in range(300):
        x = scheduler.forward_step(x, torch.zeros_like(x), t)
    torch.testing.assert_close(x, scheduler.add_noise(x_0, torch.zeros_like(x), 299), rtol=1e-12, atol=0)


def test_forward_step_may_skip_timesteps():
    """From the clean image it is the closed form, and two of them are one: their variances add up."""
    x, scheduler = torch.randn(2, 1, 4, 4, dtype=torch.float64), DDPMScheduler()
    eps, none = torch.randn_like(x), torch.zeros_like(x)
    torch.testing.assert_close(scheduler.forward_step(x, eps, 299, -1), scheduler.add_noise(x, eps, 299))
    once = scheduler.forward_step(x, none, 299, 99)
    torch.testing.assert_close(scheduler.forward_step(scheduler.forward_step(x, none, 199, 99), none, 299, 199), once)
    first = scheduler.forward_step(scheduler.forward_step(none, eps, 199, 99), none, 299, 199)
    second = scheduler.forward_step(none, eps, 299, 199)
    torch.testing.assert_close(first**2 + second**2, scheduler.forward_step(none, eps, 299, 99) ** 2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_target_gives_back_x_0_and_eps(prediction_type, schedule):
    """Given its own target as output, each prediction type gives back x_0 and eps, and one posterior."""
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False)
    generator = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, 10, 500, 990])
    x_t, target = scheduler.add_noise(x_0, eps, t), scheduler.training_target(x_0, eps, t)
    torch.testing.assert_close(scheduler.predict_original(target, x_t, t), x_0, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scheduler.predict_noise(target, x_t, t), eps, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        scheduler.reverse_distribution(target, x_t, t)[0], scheduler.posterior(x_0, x_t, t)[0], rtol=1e-8, atol=1e-10
    )


def test_snr_is_a_ratio_of_powers():
    scheduler = DDPMScheduler()
    assert scheduler.snr(torch.tensor([0, 999])).tolist() == pytest.approx([0.9999 / 0.0001, 4.0360e-5], rel=1e-4)
    assert scheduler.snr(3).shape == (1,)


@pytest.mark.slow
def test_optimal_prediction_keeps_gaussian_data_gaussian():
    """For data ~ N(0, I) the best eps_hat is sqrt(1-alpha_bar) x_t; with fixed_large every marginal stays N(0, I)."""
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    variance = torch.tensor(1.0, dtype=torch.float64)
    for t in reversed(range(1, 1000)):
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        eps_hat = (1 - scheduler.alpha_bar[t]).sqrt() * one
        mean, log_variance, _ = scheduler.reverse_distribution(eps_hat, one, t)
        # The mean is linear in x_t, so its value at 1 is the factor.
        variance = mean.item() ** 2 * variance + log_variance.exp().item()
        assert abs(variance.item() - 1) < 1e-9


@pytest.mark.slow
def test_optimal_prediction_carries_a_point_exactly():
    """For a single point mu, fixed_small carries each marginal of q onto the next and ends at mu."""
    scheduler, mu = DDPMScheduler(clip_sample=False), 0.37
    mean, variance = scheduler.alpha_bar[-1].sqrt() * mu, 1 - scheduler.alpha_bar[-1]
    for t in reversed(range(1000)):
        points = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        abar = scheduler.alpha_bar[t]
        eps_hat = (points - abar.sqrt() * mu) / (1 - abar).sqrt()
        at_0, at_1 = scheduler.reverse_distribution(eps_hat, points, t)[0].flatten()
        added = scheduler.posterior_variance[t]
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + added
        abar_prev = scheduler.alpha_bar[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
        assert abs(mean - abar_prev.sqrt() * mu) < 1e-10
        assert abs(variance - (1 - abar_prev)) < 1e-10
    assert abs(mean - mu) < 1e-10
    assert abs(variance) < 1e-10


def test_learned_variance_is_a_log_variance():
    scheduler = DDPMScheduler(variance_type="learned", clip_sample=False)
    x = torch.zeros(20_000, 1, 1, 1)
    output = torch.cat([torch.zeros_like(x), torch.full_like(x, -3.0)], dim=1)
    drawn = scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert drawn.std().item() == pytest.approx(np.exp(-1.5), rel=0.02)


def test_step_takes_a_batch_of_timesteps():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[[0, 4, 9]]
    x, output = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = scheduler.step(output, t, x, generator=generators).prev_sample
    for i in range(3):
        alone = scheduler.step(
            output[i : i + 1], t[i : i + 1], x[i : i + 1], generator=torch.Generator().manual_seed(i)
        ).prev_sample
        assert torch.equal(alone[0], together[i])


def test_sampling_by_another_object_leaves_training_alone():
    training, sampling = DDPMScheduler(), DDPMScheduler()
    sampling.set_timesteps(10)
    assert training.previous_timestep(500) == 499


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must hold num_train_timesteps = 1000 values, got 2"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "got prediction_type='epsilon'"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "got timestep_spacing='leading'"),
        ({"prediction_type": "x0"}, "prediction_type must be one of epsilon, sample, .*got 'x0'"),
        ({"variance_type": "other"}, "variance_type must be one of fixed_small, .*got 'other'"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of .*got 'even'"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of .*got 'cosine'"),
        ({"beta_end": 2.0}, r"each beta must be in \(0, 1\], got 0.0001 to 2"),
        ({"beta_end": 1.0}, "the last beta is 1, which leaves no signal"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
    ],
)
def test_scheduler_rejects_invalid_config(settings, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler(**settings)


def test_scheduler_warns_if_x_T_is_not_noise():
    with pytest.warns(UserWarning, match="alpha_bar_T = 0.36.* beta_start=0.001, beta_end=0.2"):
        DDPMScheduler(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMScheduler(100, beta_start=0.001, beta_end=0.2)
        DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps must be in \[1, 1000\], got 0: the model was trained with"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be in \[1, 1000\], got 1001"),
        ({}, "got neither"),
        ({"num_inference_steps": 3, "timesteps": [2, 1]}, "got both"),
        ({"timesteps": [5, 5]}, "must fall strictly"),
        ({"timesteps": [1000, 5]}, r"must be in \[0, 1000\), got 1000 to 5"),
        ({"timesteps": [5, -1]}, r"must be in \[0, 1000\), got 5 to -1"),
    ],
)
def test_set_timesteps_rejects_invalid_steps(arguments, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler().set_timesteps(**arguments)


def test_invalid_timesteps_are_rejected():
    scheduler, x = DDPMScheduler(), torch.zeros(1, 1, 2, 2)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=r"timesteps must be in \[0, 1000\)"):
            scheduler.add_noise(x, x, t)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="one of the scheduler's 10 timesteps, got 5"):
        scheduler.step(x, 5, x)
    with pytest.raises(ValueError, match="needs a model output of 1 channels for samples of 1, got 2"):
        scheduler.step(torch.zeros(1, 2, 2, 2), 0, x)


def test_step_denoiser_iterates_its_output():
    """x_{t-1} = f(x_t) alone, or with the reverse variance added."""
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="previous_sample")
    x, f = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 64, 64)
    assert torch.equal(scheduler.step(f, 50, x, deterministic=True).prev_sample, f)
    added = scheduler.step(f, 50, x, generator=torch.Generator().manual_seed(0)).prev_sample - f
    assert added.std().item() == pytest.approx(scheduler.posterior_variance[50].sqrt().item(), rel=0.05)
    assert torch.equal(scheduler.step(f, 0, x).prev_sample, f)


def test_step_denoiser_skips_timesteps_by_way_of_x_0():
    scheduler = DDPMScheduler(
        100, beta_schedule="squaredcos_cap_v2", prediction_type="previous_sample", clip_sample=False
    )
    x_0, eps = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, eps, 60)
    mean, _, x_0_hat = scheduler.reverse_distribution(scheduler.training_target(x_0, eps, 60), x_t, 60, 30)
    torch.testing.assert_close(x_0_hat, x_0)
    torch.testing.assert_close(mean, scheduler.posterior(x_0, x_t, 60, 30)[0])


def test_posterior_of_a_longer_step_is_bayes_rule():
    """q(x_s | x_t, x_0) times q(x_t | x_0) is q(x_s | x_0) q(x_t | x_s): compared in mean and variance of x_t."""
    scheduler = DDPMScheduler()
    x_0 = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    t, s = 700, 200
    abar_t, abar_s = scheduler.alpha_bar[t], scheduler.alpha_bar[s]
    at = [scheduler.posterior(x_0, torch.full_like(x_0, x), t, s) for x in (0.0, 1.0)]
    slope, intercept, variance = (at[1][0] - at[0][0]).item(), at[0][0].item(), at[0][1].item()
    # Marginalized over q(x_t | x_0), x_s has the mean and variance of q(x_s | x_0).
    assert slope * abar_t.sqrt() * 0.3 + intercept == pytest.approx(abar_s.sqrt().item() * 0.3, abs=1e-12)
    assert slope**2 * (1 - abar_t) + variance == pytest.approx((1 - abar_s).item(), abs=1e-12)


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_log_variance_is_clipped_in_the_last_step_only():
    """laplace's posterior variance falls below that of t = 1 at most t."""
    scheduler = DDPMScheduler(beta_schedule="laplace")
    x, t = torch.zeros(1000, 1, 1, 1, dtype=torch.float64), torch.arange(1000)
    log_variance = scheduler.posterior(x, x, t)[2].flatten()
    torch.testing.assert_close(log_variance[1:], scheduler.posterior_variance[1:].log())
    assert log_variance[0] == log_variance[1]


def test_step_of_an_image_does_not_depend_on_its_batch():
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="previous_sample")
    scheduler.set_timesteps(timesteps=[60, 59, 30, 0])
    x, f = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    t = torch.tensor([60, 59])  # one step to a neighbor, one that leaves 28 out
    together = scheduler.step(f, t, x, deterministic=True).prev_sample
    for i in range(2):
        alone = scheduler.step(f[i : i + 1], t[i : i + 1], x[i : i + 1], deterministic=True).prev_sample
        assert torch.equal(together[i], alone[0])
    assert torch.equal(together[0], f[0])


def test_step_computes_half_precision_in_float32():
    scheduler, x = DDPMScheduler(), torch.randn(1, 1, 8, 8)
    output = torch.randn(1, 1, 8, 8).to(torch.bfloat16)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    half, full = (
        scheduler.step(o, 500, x, generator=g).prev_sample
        for o, g in zip((output, output.float()), seeds, strict=True)
    )
    torch.testing.assert_close(half, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [np.int64(50), torch.tensor(50)])
def test_set_timesteps_takes_integers_of_numpy_and_torch(n):
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(n)
    assert len(scheduler.timesteps) == 50


def test_fractional_timesteps_are_rejected():
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="timesteps must be integers"):
        DDPMScheduler().add_noise(x, x, torch.tensor([0.1, 0.9]))
