"""Images from measurements: for a normal distribution their distribution is the exact posterior, by any solver."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.measurements import blur, downsample, mask, posterior_mean, project
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.restoration import restore
from tests.support.gaussian import gaussian_network, smooth_covariance
from tests.support.networks import smallest_unet_config

HOLES = np.zeros((6, 6), dtype=bool)
HOLES[1:5, 2:] = True
KERNEL = torch.tensor([[0.0, 0.3, 0.1], [0.1, 0.5, 0.0], [0.0, -0.2, 0.0]])
NOISY = [
    ("downsample", downsample(2), 0.05),
    ("gaussian blur", blur(0.7), 0.05),
    ("blur", blur(KERNEL), 0.05),
    ("mask", mask(HOLES), 0.1),
    ("numbers", lambda x: x[:, 0].cumsum(dim=2).flatten(1)[:, ::5], 0.1),
]
OPERATORS = pytest.mark.parametrize(("operator", "noise_std"), [each[1:] for each in NOISY], ids=[e[0] for e in NOISY])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pipeline_of(unet, **settings) -> Any:
    schedule = {"num_train_timesteps": 200, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    pipeline = DDPMPipeline(unet, DDPMScheduler(**{**schedule, **settings}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gaussian_pipeline(covariance, prediction_type="epsilon"):
    """With an alpha_bar_T of 3e-4: in float32 the noise alone says nothing of an x_0 that is much fainter."""
    settings = {"prediction_type": prediction_type, "clip_sample": False, "beta_schedule": "linear", "beta_end": 0.08}
    alpha_bar = pipeline_of(None, **settings).scheduler.alpha_bar
    return pipeline_of(gaussian_network(covariance, alpha_bar, prediction_type), **settings)


def random_pipeline(channels=3, size: Any = 8, **settings):
    torch.manual_seed(0)
    twice = str(settings.get("variance_type", "")).startswith("learned")
    changes = {"sample_size": size, "out_channels": channels * (1 + twice)}
    return pipeline_of(diffusers.UNet2DModel(**smallest_unet_config(channels, **changes)).eval(), **settings)


def matrix_of(operator, side=6):
    """A as a matrix of float64, whose columns are the measurements of single pixels."""
    return operator(torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)).flatten(1).T


def exact_posterior(covariance, matrix, y, noise_std):
    """Mean and covariance of x ~ N(0, covariance) given y = A x + noise."""
    noise = noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = covariance @ matrix.T @ (matrix @ covariance @ matrix.T + noise).inverse()
    return gain @ y, covariance - gain @ matrix @ covariance


def measured_image(covariance, operator, noise_std, seed=1):
    """The measurement, in [0, 1] and in [-1, 1], of an image of N(0, covariance) in [-1, 1]."""
    x_0 = torch.linalg.cholesky(covariance) @ torch.randn(len(covariance), generator=seeded(seed)).double()
    image = (x_0 / 2 + 0.5).view(1, 1, 6, 6)
    measured = operator(image)
    y = measured + noise_std * torch.randn(measured.shape, generator=seeded(2)).double()
    return y.float(), (2 * y - operator(torch.ones_like(image))).flatten()


@OPERATORS
def test_gradient_of_an_operator_is_its_adjoint(operator, noise_std):
    x = torch.randn(2, 1, 6, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    measured = operator(x)
    y = torch.randn(measured.shape, generator=seeded(1), dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(measured, x, y)
    torch.testing.assert_close((measured * y).sum(), (x * adjoint).sum())
    torch.testing.assert_close(adjoint.flatten(1), y.flatten(1) @ matrix_of(operator))


def test_operators_compute_what_they_say():
    x = torch.rand(1, 2, 4, 6, generator=seeded())
    assert torch.allclose(downsample(2)(x)[0, 1, 1, 2], x[0, 1, 2:4, 4:6].mean())
    kept = mask(Image.fromarray(np.triu(np.full((4, 6), 255, np.uint8))))(x)
    assert torch.equal(kept, x.tril(-1))
    torch.testing.assert_close(blur(0.8)(torch.ones(1, 3, 5, 4)), torch.ones(1, 3, 5, 4))
    at_edge = 0.3 * x[0, 0, 0, 2] + 0.1 * x[0, 0, 0, 3] + 0.1 * x[0, 0, 0, 1] + 0.5 * x[0, 0, 0, 2]
    torch.testing.assert_close(blur(KERNEL)(x)[0, 0, 0, 2], at_edge - 0.2 * x[0, 0, 1, 2])
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    offsets = torch.arange(31) - 15.0
    assert abs(float((blur(2.0)(point)[0, 0] * offsets**2).sum()) - 4) < 0.15  # three standard deviations of a tail


@OPERATORS
@pytest.mark.parametrize("t", [0, 50, 198])
def test_posterior_mean_is_exact_for_a_normal_distribution(operator, noise_std, t):
    """E[x_0 | x_t, y] by its precision, Sigma^-1 + abar/(1 - abar) I + A^T A / sigma_y^2, at each noise level."""
    covariance = smooth_covariance(6)
    pipeline, matrix = gaussian_pipeline(covariance), matrix_of(operator)
    alpha_bar = float(pipeline.scheduler.alpha_bar[t])
    x_t = torch.randn(3, 1, 6, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    y = torch.randn(operator(x_t).shape, generator=seeded(1), dtype=torch.float64)
    x_0_hat = pipeline.scheduler.predict_original(pipeline.unet(x_t, t).sample, x_t, t)
    mean = posterior_mean(x_0_hat, x_t, y, operator, noise_std, alpha_bar, num_gradients=60)
    snr = alpha_bar / (1 - alpha_bar)
    precision = covariance.inverse() + snr * torch.eye(36) + matrix.T @ matrix / noise_std**2
    weighted = snr / math.sqrt(alpha_bar) * x_t.detach().flatten(1) + y.flatten(1) @ matrix / noise_std**2
    torch.testing.assert_close(mean.flatten(1), weighted @ precision.inverse(), rtol=0, atol=1e-6)


def test_posterior_mean_of_known_pixels_needs_as_many_gradients_as_there_are():
    """A mean that is not 0, and no noise: a constant factor of the covariance, here 1, drops out."""
    covariance, mean = smooth_covariance(3), torch.linspace(-1, 1, 9, dtype=torch.float64)
    is_known = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    y = torch.arange(9, dtype=torch.float64) * is_known
    x_t = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    x_0_hat = (mean + covariance @ x_t.flatten()).view(1, 1, 3, 3)
    known = mask(~is_known.view(3, 3))
    for alpha_bar in (0.0, 0.5):
        conditional = posterior_mean(x_0_hat + 0, x_t, y.view(1, 1, 3, 3), known, 0.0, alpha_bar, 3)
        x_0_hat = (mean + covariance @ x_t.flatten()).view(1, 1, 3, 3)
        gain = covariance[:, is_known] @ covariance[is_known][:, is_known].inverse()
        torch.testing.assert_close(conditional.flatten(), mean + gain @ (y - mean)[is_known])


def test_projection_leads_to_the_nearest_image_that_fits():
    x, other = torch.rand(2, 2, 3, 6, 6, generator=seeded())
    for operator in (downsample(3), mask(HOLES), lambda x: 5 * mask(HOLES[::3, ::3])(downsample(3)(x))):
        projected = project(x, operator(other), operator)
        torch.testing.assert_close(operator(projected), operator(other))
        unseen = project(other, 0 * operator(other), operator)
        assert abs(float(((x - projected) * unseen).sum())) < 1e-4
        assert float((x - projected).norm()) > 0.1


def test_projection_leaves_what_it_cannot_fit_in_one_step():
    x, other = torch.rand(2, 2, 3, 6, 6, generator=seeded())
    assert torch.equal(project(x, blur(1.0)(other), blur(1.0)), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "noise_std"), [each[1:] for each in (*NOISY[:2], NOISY[3])], ids=["downsample", "blur", "mask"]
)
def test_restored_images_have_mean_and_covariance_of_the_exact_posterior(operator, noise_std):
    covariance, count = smooth_covariance(6, std=0.2), 150
    y, centered = measured_image(covariance, operator, noise_std)
    pipeline = gaussian_pipeline(covariance).use("unipc", 40)
    ys, settings = y.expand(count, *y.shape[1:]), {"output_type": "pt", "num_gradients": 6}
    images = restore(pipeline, ys, operator, noise_std, generator=seeded(), **settings)
    samples = (2 * images - 1).flatten(1).double()
    mean, exact = exact_posterior(covariance, matrix_of(operator), centered, 2 * noise_std)
    values, vectors = torch.linalg.eigh(exact)
    z = ((samples.mean(dim=0) - mean) @ vectors) / (values / count).sqrt()
    assert float(z.square().mean().sqrt()) < 1.3
    # The expected squared error of the covariance of so many samples; sampling in 40 steps adds to it.
    expected = (exact.trace() ** 2 + exact.square().sum()) / count
    assert float(((torch.cov(samples.T) - exact).square().sum() / expected).sqrt()) < 1.3


@pytest.mark.parametrize(
    ("name", "kind"),
    [*[(name, "epsilon") for name in UNTUNED_SCHEDULERS], ("unipc", "sample"), ("ddpm", "v_prediction")],
)
@pytest.mark.parametrize(("operator", "noise_std"), [each[1:] for each in NOISY[::3]], ids=["downsample", "mask"])
def test_each_step_is_that_of_the_exact_network_of_the_posterior(operator, noise_std, name, kind):
    """The same solver, given the network of N(mean, covariance) of the posterior, makes the same images."""
    covariance = smooth_covariance(6, std=0.2)
    y, centered = measured_image(covariance, operator, noise_std)
    mean, exact = exact_posterior(covariance, matrix_of(operator), centered, 2 * noise_std)
    pipeline = gaussian_pipeline(covariance, kind).use(name, 5)
    images = restore(pipeline, y, operator, noise_std, generator=seeded(), output_type="pt", num_gradients=40)
    # What is beside the mean is sampled from noise without its part of x_T.
    generator, signal = seeded(), pipeline.scheduler.alpha_bar[-1].sqrt()
    latents = torch.randn(1, 1, 6, 6, generator=generator) - (signal * mean).view(1, 1, 6, 6).float()
    of_posterior = gaussian_pipeline(exact, kind).use(name, 5)
    beside = of_posterior(1, generator, latents=latents, output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, (beside * 2 - 1) + mean.view(1, 1, 6, 6).float(), rtol=0, atol=2e-3)


MODELS = [
    *[({"prediction_type": "epsilon"}, name) for name in UNTUNED_SCHEDULERS],
    ({"prediction_type": "sample"}, "unipc"),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "ddim"),
    ({"variance_type": "learned_range"}, "ddpm"),
    ({"variance_type": "learned_range"}, "dpmsolver++"),
    ({"thresholding": True, "clip_sample": False}, "ddpm"),
    ({"prediction_type": "previous_sample"}, "ddpm"),
]


@pytest.mark.parametrize(("settings", "name"), MODELS, ids=str)
def test_images_of_any_model_have_the_measurement_without_noise(settings, name):
    """Of a network that knows nothing, too, and of images that are not square."""
    pipeline = random_pipeline(size=(8, 4), **settings).use(name, 3)
    y = torch.rand(2, 3, 4, 2, generator=seeded()) * 0.2 + 0.4
    images = restore(pipeline, y, downsample(2), generator=seeded(), output_type="pt")
    assert images.shape == (2, 3, 8, 4)
    is_clipped = (images == 0) | (images == 1)
    fits = ~downsample(2)(is_clipped.float()).bool()
    if name != "ddpm" or not settings.get("thresholding"):
        assert bool(fits.any())
    torch.testing.assert_close(downsample(2)(images)[fits], y[fits], rtol=0, atol=1e-4)


def test_less_noise_fits_the_measurement_more_closely():
    covariance = smooth_covariance(6, std=0.2)
    pipeline, errors = gaussian_pipeline(covariance).use("unipc", 5), []
    y, _ = measured_image(covariance, downsample(2), 0.0)
    for noise_std in (0.1, 0.01, 0.001, 0.0):
        images = restore(pipeline, y, downsample(2), noise_std, generator=seeded(), output_type="pt", num_gradients=9)
        errors.append(float((downsample(2)(images) - y).square().mean().sqrt()))
        assert errors[-1] <= max(noise_std, 1e-6)
    assert errors == sorted(errors, reverse=True)


def test_mask_without_noise_is_inpainting():
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}  # nothing of the image is in x_T
    pipeline, given = random_pipeline(**settings).use("unipc", 5), torch.rand(2, 3, 8, 8, generator=seeded())
    holes = np.zeros((8, 8), dtype=bool)
    holes[2:5, 3:] = True
    filled = DDPMInpaintPipeline.from_pipe(pipeline)(given, holes, generator=seeded(1), output_type="pt").images
    restored = restore(pipeline, mask(holes)(given), mask(holes), generator=seeded(1), output_type="pt")
    torch.testing.assert_close(restored, filled, rtol=0, atol=1e-3)


def test_measurements_may_be_pictures_and_images_have_generators_of_their_own():
    pipeline = random_pipeline().use("unipc", 3)
    small = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in small]
    generators = [seeded(i) for i in range(3)]
    images = restore(pipeline, pictures, downsample(2), 0.01, generator=generators, output_type="np")
    y = torch.tensor(small).permute(0, 3, 1, 2) / 255
    for i in range(3):
        alone = restore(pipeline, y[i], downsample(2), 0.01, generator=[seeded(i)], output_type="np")
        np.testing.assert_allclose(alone[0], images[i], rtol=0, atol=1e-3)
    (picture,) = restore(pipeline, pictures[0], downsample(2))
    assert picture.size == (8, 8)


def test_classes_and_guidance_change_images_and_the_pipeline_stays_as_it_was():
    torch.manual_seed(0)
    unet, guide = (diffusers.UNet2DModel(**smallest_unet_config(3, num_class_embeds=5)).eval() for _ in range(2))
    pipeline, y = pipeline_of(unet), torch.full((1, 3, 4, 4), 0.5)
    pipeline.guide, own = guide, pipeline.scheduler
    with pytest.raises(ValueError, match="class_labels must be given"):
        restore(pipeline, y, downsample(2))
    images = [
        restore(pipeline, y, downsample(2), 0.1, 3, seeded(), "np", class_labels=label, guidance_scale=scale)
        for label, scale in ((0, None), (1, None), (1, 3.0))
    ]
    assert not np.allclose(images[0], images[1], atol=1e-4)
    assert not np.allclose(images[1], images[2], atol=1e-4)
    assert pipeline.scheduler is own
    assert pipeline.sampler is None
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())


HALF = downsample(2)
Y = torch.full((2, 3, 4, 4), 0.5)
BAD = [
    ({"noise_std": -0.1}, "noise_std must be finite and at least 0, got -0.1"),
    ({"noise_std": math.nan}, "noise_std must be finite and at least 0, got nan"),
    ({"noise_std": "small"}, "noise_std must be finite and at least 0, got 'small'"),
    ({"num_gradients": 0}, "num_gradients must be a whole number of at least 1, got 0"),
    ({"measurement": torch.rand(2, 3, 8, 8)}, r"shape that the operator gives .* \(3, 4, 4\), got \(2, 3, 8, 8\)"),
    ({"measurement": Y[:0]}, r"measurement must have the shape .* got \(0, 3, 4, 4\)"),
    ({"measurement": Y * math.nan}, "measurement must be finite, got NaN or infinity"),
    ({"measurement": np.zeros((8, 8, 3), np.uint8)}, "measurement must be 4 pixels high and 4 wide .* got 8 and 8"),
    ({"measurement": [1, 2], "operator": lambda x: x.flatten(1)}, "must be a floating-point tensor, got list"),
    ({"operator": downsample(3)}, "factor must divide the height and the width of the images, 8 and 8, got 3"),
    ({"operator": mask(HOLES)}, "mask_image must be 8 pixels high and 8 wide"),
    ({"operator": lambda x: HALF(x) + 1}, r"operator must be linear, A\(0\) = 0, got a difference of 1"),
    ({"operator": lambda x: HALF(x).abs()}, r"operator must be linear, A\(u - 2 v\) = A\(u\) - 2 A\(v\)"),
    ({"operator": lambda x: HALF(x - x.mean(dim=0))}, "operator must be linear"),
    ({"operator": lambda x: x + (HALF(x).repeat(1, 1, 2, 2).round() - x).detach()}, "linear|gradient of what"),
    ({"operator": lambda x: x + x.detach()}, "operator must have the gradient of what it computes"),
    ({"operator": lambda x: x.detach()}, "operator must be made of operations of torch that have gradients"),
    ({"operator": lambda x: torch.tensor(x.numpy())}, "made of operations of torch that have gradients, got Runtime"),
    ({"operator": lambda x: x @ torch.ones(5, 5)}, r"must take images \(B, 3, 8, 8\) .* got RuntimeError: mat1"),
    ({"operator": lambda x: [x]}, "operator must return a tensor, got list"),
    ({"operator": lambda x: x.sum()}, r"operator must return real measurements .* the shape \(\) for 4 images"),
    ({"operator": torch.fft.fft2}, "operator must return real measurements .* got torch.complex64"),
    ({"output_type": "latent"}, "output_type must be 'pil', 'np' or 'pt', got 'latent'"),
    ({"generator": [seeded()]}, "a list of generators must hold batch_size = 2, got 1"),
    ({"num_inference_steps": 201}, r"num_inference_steps must be in \[1, 200\], got 201"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_refused_before_the_network_is_evaluated(arguments, message):
    pipeline = random_pipeline()
    pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match=message) as raised:
        restore(pipeline, **{"measurement": Y, "operator": HALF, **arguments})
    assert "\n" not in str(raised.value)


def test_restoring_within_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode: use torch\.no_grad"):
        restore(random_pipeline(), Y, HALF)


@pytest.mark.parametrize(
    ("operator_of", "value", "message"),
    [
        (downsample, 0, "factor must be a whole number of at least 1, got 0"),
        (downsample, 1.5, "factor must be a whole number of at least 1, got 1.5"),
        (blur, 0, "kernel must be weights .* got 0"),
        (blur, math.inf, "kernel must be weights .* got inf"),
        (blur, torch.ones(2, 3), r"kernel must be finite weights .* got the shape \(2, 3\)"),
    ],
)
def test_operators_refuse_bad_values(operator_of, value, message):
    with pytest.raises(ValueError, match=message):
        operator_of(value)
