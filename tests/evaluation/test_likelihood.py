"""Bits per dimension against printed terms, closed forms and known entropies; the estimator and its sums."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.evaluation.likelihood import (
    bits_per_dimension,
    draw_bound,
    draw_timesteps,
    inclusion_probabilities,
    prior_term,
    sum_bound_terms,
)
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.scheduler import DDPMScheduler

REFERENCE = json.loads((Path(__file__).parents[1] / "support/gaussian_diffusion_reference.json").read_text())
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "previous_sample"]
FAST: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}  # leaves no image in x_T, however few the steps
VARIANCE_TYPES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


def measure(network, scheduler, images, **settings):
    settings = {"seed": 0, "batch_size": 64, **settings}
    return bits_per_dimension(sum_bound_terms(network, scheduler, images, **settings))


def optimal_network(scheduler, denoise):
    """Return the best network for data whose mean and variance given x_t are known.

    Args:
        denoise: A function of x_t and alpha_bar that returns mean and variance of x_0 given x_t.
    """

    def network(x_t, t):
        x_t, alpha_bar = x_t.double(), scheduler.alpha_bar[t].view(-1, 1, 1, 1)
        x_0_hat, variance = denoise(x_t, alpha_bar)
        eps_hat = (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()
        mean, posterior_variance, min_log = scheduler.posterior(x_0_hat, x_t, t)
        output = {
            "epsilon": eps_hat,
            "sample": x_0_hat,
            "v_prediction": alpha_bar.sqrt() * eps_hat - (1 - alpha_bar).sqrt() * x_0_hat,
            "previous_sample": mean,
        }[scheduler.config.prediction_type]
        if not scheduler.config.variance_type.startswith("learned"):
            return SimpleNamespace(sample=output)
        # The variance of p(x_{t-1} | x_t) that fits best: that of q given x_0, and of x_0 in its mean.
        factor = scheduler.posterior(torch.ones_like(x_t), torch.zeros_like(x_t), t)[0]
        log_variance = (posterior_variance + factor.square() * variance).clamp(min=1e-12).log()
        if scheduler.config.variance_type == "learned_range":
            span = (scheduler.beta[t].log().view(-1, 1, 1, 1) - min_log).clamp(min=1e-9)
            log_variance = (2 * (log_variance - min_log) / span - 1).clamp(-1, 1)
        return SimpleNamespace(sample=torch.cat([output, log_variance], dim=1))

    return network


def gaussian_denoiser(std):
    """Return the denoiser of data x_0 ~ N(0, std^2 I)."""

    def denoise(x_t, alpha_bar):
        total = alpha_bar * std**2 + 1 - alpha_bar
        return alpha_bar.sqrt() * std**2 / total * x_t, (std**2 * (1 - alpha_bar) / total).expand_as(x_t)

    return denoise


def gaussian_levels(std):
    """Return the probabilities of the 256 values that a Gaussian is rounded to."""
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -math.inf, math.inf
    return torch.special.ndtr(edges / std).diff()


def entropy(probabilities):
    return float(-torch.special.xlogy(probabilities, probabilities).sum() / math.log(2))


def elementwise_network(x_t, t, class_labels=None):
    """Treat each value alone: no bit of an image's output depends on its batch."""
    return SimpleNamespace(sample=0.5 * x_t + 0.001 * t.view(-1, 1, 1, 1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, seed=0, shape=(1, 4, 4)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("name", ["linear/1000", "cosine/1000"])
def test_prior_term_equals_the_reference(name):
    i, k = np.arange(36), REFERENCE["inputs"]["k"]
    x_0 = torch.tensor(np.round((np.sin(0.37 * i + k) + 1) * 127.5) / 127.5 - 1).reshape(6, 1, 2, 3)
    scheduler = DDPMScheduler(beta_schedule={"l": "linear", "c": "squaredcos_cap_v2"}[name[0]])
    wanted = torch.tensor(REFERENCE["schedules"][name]["prior_bits_per_dim"], dtype=torch.float64)
    # The reference is a difference that loses digits, in float64, and is printed to 12 of them.
    torch.testing.assert_close(prior_term(scheduler, x_0), wanted, rtol=1e-8, atol=1e-15)


def test_prior_term_is_zero_at_zero_terminal_snr():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert prior_term(scheduler, torch.ones(3, 1, 2, 2)).tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear/1000", "cosine/1000"])
def test_terms_equal_the_reference(name, monkeypatch):
    """The noise and the network's output of the printed cases go through the whole measurement."""
    values, i, k = REFERENCE["schedules"][name], torch.arange(36, dtype=torch.float64), REFERENCE["inputs"]["k"]
    shape, steps = (6, 1, 2, 3), values["t"]
    pixels = ((torch.sin(0.37 * i + k) + 1) * 127.5).round().to(torch.uint8).view(shape)
    noise, output, variance_output = (
        x.float().view(shape)
        for x in (1.3 * torch.cos(0.73 * i + 2 * k), 0.9 * torch.sin(1.11 * i + 3 * k), 0.8 * torch.cos(0.29 * i + k))
    )
    for case, wanted in values["p"].items():
        prediction_type, variance_type, clip = case.split("/")
        scheduler = DDPMScheduler(
            beta_schedule={"l": "linear", "c": "squaredcos_cap_v2"}[name[0]],
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_sample=clip == "clip=True",
        )
        # With two steps per image, 0 and another, this tells the number of an image that has step t.
        probability = inclusion_probabilities(scheduler, 2)
        drawn = draw_timesteps(probability, 0, np.arange(50_000))
        for j, t in enumerate(steps):
            channels = [output[j], variance_output[j]] if variance_type.startswith("learned") else [output[j]]
            answer = SimpleNamespace(sample=torch.cat(channels)[None])
            monkeypatch.setattr(torch, "randn", lambda *_, j=j, **__: noise[j])
            number = int((drawn == t).any(dim=1).nonzero()[0])
            images = pixels[j].expand(number + 1, -1, -1, -1)
            settings: dict[str, Any] = {"seed": 0, "batch_size": 1, "timesteps_per_image": 2}
            sums = sum_bound_terms(lambda x_t, t, a=answer: a, scheduler, images, [number], **settings)
            # x_t is in float32, as it is for the network.
            assert sums[t, 1].item() == pytest.approx(wanted["vlb_bits_per_dim"][j], rel=2e-5, abs=1e-7), case
            bound = sums[-2, 1] + (sums[:-2, 1] / probability).sum()
            assert sums[-1, 1].item() == pytest.approx(bound.item())


def test_terms_have_the_mean_of_the_closed_form():
    """For x_0_hat = g_t x_t, E|x_0_hat - x_0|^2 is known, and with it each L_t of fixed_small for t > 0."""
    scheduler, generator = DDPMScheduler(50, prediction_type="sample", clip_sample=False, beta_end=0.3), seeded(3)
    images = torch.randint(0, 256, (64, 1, 8, 8), generator=generator).to(torch.uint8)
    x_0 = images.double() / 127.5 - 1
    result = measure(optimal_network(scheduler, gaussian_denoiser(0.5)), scheduler, images)
    t, alpha_bar = torch.arange(1, 50), scheduler.alpha_bar[1:]
    gain = alpha_bar.sqrt() * 0.25 / (alpha_bar * 0.25 + 1 - alpha_bar)
    error = (gain * alpha_bar.sqrt() - 1) ** 2 * x_0.square().mean() + gain**2 * (1 - alpha_bar)
    factor = scheduler.alpha_bar[t - 1].sqrt() * scheduler.beta[t] / (1 - alpha_bar)
    wanted = factor**2 * error / scheduler.posterior_variance[t] / 2 / math.log(2)
    # x_0 is the same for each t, so that this part of the error is.
    z = (result.terms[1:] - wanted) / result.term_standard_errors[1:]
    assert z.abs().max() < 4
    torch.testing.assert_close(result.terms[1:], wanted, rtol=0.1, atol=0)
    assert result.terms.sum() + result.prior == pytest.approx(result.bits_per_dimension, rel=1e-12)
    assert result.decoder == result.terms[0]


def test_bound_is_that_of_the_clipped_model():
    """x_0_hat is held at the very values that sampling sees."""
    scheduler, plain = (
        DDPMScheduler(20, **FAST),
        DDPMScheduler(20, prediction_type="sample", clip_sample=False, **FAST),
    )
    images = random_images(7)

    def clipped(x_t, t):
        return SimpleNamespace(sample=scheduler.predict_original(-x_t, x_t, t).clamp(-1, 1))

    def raw(x_t, t):
        return SimpleNamespace(sample=scheduler.predict_original(-x_t, x_t, t))

    bound = measure(lambda x_t, t: SimpleNamespace(sample=-x_t), scheduler, images)
    torch.testing.assert_close(bound.terms, measure(clipped, plain, images).terms)
    assert bound.bits_per_dimension < measure(raw, plain, images).bits_per_dimension / 2


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_bound_of_gaussian_values_is_a_little_above_their_entropy(variance_type):
    """Best means and 100 steps: with best variances, too, next to nothing is lost."""
    std = 0.2
    levels = gaussian_levels(std)
    assert entropy(levels) == pytest.approx(math.log2(std * math.sqrt(2 * math.pi * math.e) * 127.5), abs=0.01)
    images = torch.multinomial(levels, 16 * 512, replacement=True, generator=seeded(1)).view(16, 2, 16, 16)
    # What an ideal code spends on these very images; its mean is the entropy.
    least = float(-levels.log2()[images].mean())

    def measured(prediction_type, some):
        settings: dict[str, Any] = {"prediction_type": prediction_type, "variance_type": variance_type}
        scheduler = DDPMScheduler(100, clip_sample=False, **FAST, **settings)
        return measure(optimal_network(scheduler, gaussian_denoiser(std)), scheduler, some.to(torch.uint8))

    result = measured("epsilon", images)
    gap, error = result.bits_per_dimension - least, result.standard_error
    lowest, highest = {"fixed_s": (0.6, 1.2), "fixed_l": (0.02, 0.25), "learned": (0, 0.03)}[variance_type[:7]]
    assert error < 0.04
    assert lowest - 3 * error < gap < highest + 3 * error
    few = [measured(prediction_type, images[:2]).bits_per_dimension for prediction_type in PREDICTION_TYPES]
    assert few == [pytest.approx(few[0], rel=1e-6)] * 4


@pytest.mark.parametrize(
    "variance_type", [pytest.param("learned", marks=pytest.mark.slow), "fixed_small", "fixed_large"]
)
def test_bound_of_four_images_is_a_little_above_two_bits(variance_type):
    """Four images of 2x2 values, equally likely: the entropy is 2 bits, and half a bit per dimension."""
    few = torch.randint(0, 256, (4, 1, 2, 2), generator=seeded(2)).to(torch.uint8)
    known = few.flatten(1).double() / 127.5 - 1

    def denoise(x_t, alpha_bar):
        distance = (x_t.flatten(1)[:, None] - alpha_bar.sqrt().view(-1, 1, 1) * known).square().sum(dim=2)
        weight = torch.softmax(-distance / (1 - alpha_bar.view(-1, 1)) / 2, dim=1)
        mean = weight @ known
        variance = (weight @ known.square() - mean.square()).clamp(min=0)
        return mean.view(x_t.shape), variance.view(x_t.shape)

    scheduler = DDPMScheduler(variance_type=variance_type, clip_sample=False, **FAST)
    images, some = few.repeat(16, 1, 1, 1), None if variance_type == "learned" else 100
    network = optimal_network(scheduler, denoise)
    result = measure(network, scheduler, images, timesteps_per_image=some)
    gap, error = result.bits_per_dimension - 0.5, result.standard_error
    assert error < 0.03
    # With a variance of its own the decoder is sure of its value; at that of t = 1 it gives neighbors a share.
    lowest, highest = {"learned": (0, 0.02), "fixed_small": (0.5, 0.8), "fixed_large": (0.8, 1.3)}[variance_type]
    assert lowest - 3 * error < gap < highest + 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [2, 3, 20, 400, 999])
def test_draw_timesteps_draws_each_step_with_its_probability(beta_schedule, count):
    scheduler, num_images = DDPMScheduler(beta_schedule=beta_schedule), 20_000
    probability = inclusion_probabilities(scheduler, count)
    assert probability.shape == (1000,)
    assert probability[0] == 1
    assert probability.min() >= (count - 1) / 999 / 4
    assert probability.max() <= 1
    assert probability.sum().item() == pytest.approx(count)
    chosen = draw_timesteps(probability, 0, np.arange(num_images))
    assert chosen.shape == (num_images, count)
    assert (chosen[:, 1:] > chosen[:, :-1]).all()
    frequency = torch.bincount(chosen.flatten(), minlength=1000) / num_images
    error = (probability * (1 - probability) / num_images).sqrt()
    assert ((frequency - probability).abs() <= 4.5 * error + 1e-9).all()


def test_drawing_all_steps_equals_taking_each_step():
    scheduler = DDPMScheduler(20, **FAST)
    assert torch.equal(inclusion_probabilities(scheduler, None), torch.ones(20, dtype=torch.float64))
    images = random_images(5)
    all_of_them = sum_bound_terms(elementwise_network, scheduler, images, seed=0, batch_size=64)
    counted = sum_bound_terms(elementwise_network, scheduler, images, seed=0, batch_size=64, timesteps_per_image=20)
    assert torch.equal(all_of_them, counted)
    assert (all_of_them[:, 0] == 5).all()


@pytest.mark.slow
def test_drawn_steps_give_an_unbiased_bound_and_its_standard_error():
    """150 measurements, each of 12 fresh images and 4 of 20 steps."""
    scheduler = DDPMScheduler(20, **FAST)
    results = []
    for seed in range(150):
        images = random_images(12, seed)
        some = measure(elementwise_network, scheduler, images, seed=seed, timesteps_per_image=4)
        assert int(some.term_counts.sum()) == 12 * 4
        assert some.term_counts[0] == 12
        # The noise at each t is the same in both.
        full = measure(elementwise_network, scheduler, images, seed=seed) if seed < 64 else some
        assert some.prior == full.prior
        assert some.decoder == pytest.approx(full.decoder, rel=1e-12)
        results.append((some.bits_per_dimension, full.bits_per_dimension, some.standard_error))
    some, full, error = np.array(results).T
    difference = (some - full)[:64]
    assert abs(difference.mean()) < 3 * difference.std() / 8
    assert difference.std() > 0.02 * full[:64].std()
    # 150 values tell their spread to 6 %.
    assert some.std() == pytest.approx(np.sqrt((error**2).mean()), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("timesteps_per_image", [None, 5])
def test_sums_do_not_depend_on_shares_or_batches(timesteps_per_image):
    scheduler, images = DDPMScheduler(20, **FAST), random_images(7)
    settings: dict[str, Any] = {"seed": 5, "timesteps_per_image": timesteps_per_image}
    whole = sum_bound_terms(elementwise_network, scheduler, images, batch_size=7, **settings)
    for num_shares, batch_size in [(1, 1), (1, 3), (2, 2), (3, 64), (9, 1)]:
        parts = [
            sum_bound_terms(
                elementwise_network,
                scheduler,
                torch.from_numpy(images) if rank else list(images),
                range(rank, 7, num_shares),
                batch_size=batch_size,
                **settings,
            )
            for rank in range(num_shares)
        ]
        torch.testing.assert_close(sum(reversed(parts)), whole, rtol=1e-9, atol=1e-12)
    other = sum_bound_terms(elementwise_network, scheduler, images, batch_size=7, **{**settings, "seed": 6})
    assert not torch.allclose(other, whole)


def test_bits_per_dimension_gives_mean_and_standard_error_of_the_images():
    """One image at a time gives the values whose mean and standard error the sums are."""
    scheduler, images = DDPMScheduler(5, **FAST), random_images(6)
    each = [sum_bound_terms(elementwise_network, scheduler, images, [i], seed=0, batch_size=1) for i in range(6)]
    result, values = bits_per_dimension(torch.stack(each).sum(dim=0)), torch.stack(each)[:, :, 1]
    mean, error = values.mean(dim=0), values.std(dim=0) / math.sqrt(6)
    assert result.bits_per_dimension == pytest.approx(mean[-1].item())
    assert result.standard_error == pytest.approx(error[-1].item())
    assert result.prior == pytest.approx(mean[-2].item())
    torch.testing.assert_close(result.terms, mean[:-2])
    torch.testing.assert_close(result.term_standard_errors, error[:-2])
    assert result.num_images == 6
    assert result.term_counts.tolist() == [6] * 5
    assert result.non_finite_timesteps == []


@pytest.mark.slow
def test_bound_of_a_unet_depends_on_the_batch_by_rounding_alone(make_unet):
    unet, images = make_unet(channels=3), random_images(5, shape=(3, 8, 8))
    one, other = (measure(unet, DDPMScheduler(), images, batch_size=size, timesteps_per_image=6) for size in (5, 2))
    assert one.bits_per_dimension == pytest.approx(other.bits_per_dimension, rel=1e-5)
    assert math.isfinite(one.standard_error)


def test_network_gets_the_class_label_of_each_image():
    labels, images = np.arange(7)[::-1], np.arange(7, dtype=np.uint8)[::-1].reshape(7, 1, 1, 1) * 30
    seen = set()

    def network(x_t, t, class_labels):
        assert class_labels.dtype == torch.int64
        seen.update((int(label), int(i)) for label, i in zip(class_labels, t, strict=True))
        return SimpleNamespace(sample=class_labels.view(-1, 1, 1, 1) * 30 / 127.5 - 1)

    scheduler = DDPMScheduler(10, prediction_type="sample", **FAST)
    # The network knows each image by its label: but for the decoder no bits are left.
    result = measure(network, scheduler, images, class_labels=labels, batch_size=3)
    assert result.terms[1:].abs().max() < 1e-9
    assert len(seen) == 70


@pytest.mark.slow
def test_bits_per_dimension_names_timesteps_that_are_not_finite(tmp_path):
    def network(x_t, t):
        bad = torch.where(t == 3, torch.nan, torch.where(t == 7, torch.inf, 0.0))
        return SimpleNamespace(sample=x_t * 0.5 + bad.view(-1, 1, 1, 1))

    result = measure(network, DDPMScheduler(10, clip_sample=False, **FAST), random_images(4))
    assert result.non_finite_timesteps == [3, 7]
    assert math.isnan(result.bits_per_dimension)
    assert result.terms.isfinite().sum() == 8
    draw_bound(result, tmp_path / "bound.png")
    assert (tmp_path / "bound.png").exists()


@pytest.mark.slow
def test_draw_bound_writes_a_picture(tmp_path):
    result = measure(elementwise_network, DDPMScheduler(50, **FAST), random_images(2), timesteps_per_image=5)
    assert result.terms.isnan().any()
    draw_bound(result, tmp_path / "bound.png")
    with Image.open(tmp_path / "bound.png") as picture:
        assert picture.size == (900, 450)
        assert len(picture.getcolors(1 << 20) or ()) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 1, 4, 4), np.uint16)}, "uint8 .* 'uint16'.*preserve_input_precision"),
        ({"images": torch.zeros(2, 1, 4, 4)}, "uint8 .* 'float32'"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"\(C, H, W\)"),
        ({"images": [np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 5), np.uint8)]}, "of one shape"),
        ({"images": np.zeros((1, 1, 4, 4), np.uint8)}, "at least 2, got 1"),
        ({"timesteps_per_image": 1}, r"timesteps_per_image must be in \[2, 20\].* got 1"),
        ({"timesteps_per_image": 21}, r"timesteps_per_image must be in \[2, 20\].* got 21"),
        ({"class_labels": [1]}, "one for each of 4 images, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"network": torch.nn.Identity().train()}, "unet must be in eval mode"),
        ({"scheduler": diffusers.DDPMScheduler()}, "hf_ddpm's DDPMScheduler"),
    ],
)
def test_sum_bound_terms_rejects_what_cannot_work(change, message):
    arguments = {"network": elementwise_network, "scheduler": DDPMScheduler(20, **FAST), "images": random_images(4)}
    with pytest.raises(UsageError, match=message):
        measure(**{**arguments, **change})
