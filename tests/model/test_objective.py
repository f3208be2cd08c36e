"""The loss: its draws, its target and its weights."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from hf_ddpm import objective
from hf_ddpm.bound import variational_bound
from hf_ddpm.objective import VARIATIONAL_BOUND_WEIGHT, Objective, posterior_means
from hf_ddpm.scheduler import DDPMScheduler

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "previous_sample"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(x_0, seed=0, num_timesteps=1000):
    """Return timesteps and noise for `x_0`, as the keyword arguments of an objective."""
    timesteps = torch.randint(num_timesteps, (len(x_0),), generator=seeded(seed))
    return {"timesteps": timesteps, "noise": torch.randn(x_0.shape, generator=seeded(seed + 1))}


def linear_network(x_t, t, scale=0.5):
    return SimpleNamespace(sample=scale * x_t + 0.001 * t.view(-1, 1, 1, 1))


def test_loss_is_algorithm_1_of_ho_et_al():
    scheduler, x_0 = DDPMScheduler(), torch.rand(4, 1, 8, 8) * 2 - 1
    torch.manual_seed(0)
    loss = Objective(scheduler)(linear_network, x_0)
    torch.manual_seed(0)
    t = (torch.rand(4) * 1000).long()
    eps = torch.randn(x_0.shape)
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    expected = (linear_network(x_t, t).sample - eps).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("given", ["timesteps", "noise"])
def test_timesteps_and_noise_may_be_given_alone(given):
    objective, x_0 = Objective(DDPMScheduler()), torch.rand(4, 1, 8, 8) * 2 - 1
    values = {"timesteps": torch.tensor([0, 500, 999, 7]), "noise": torch.randn(x_0.shape)}
    torch.manual_seed(0)
    loss = objective(linear_network, x_0, **{given: values[given]})
    torch.manual_seed(0)
    drawn = {"timesteps": lambda: (torch.rand(4) * 1000).long(), "noise": lambda: torch.randn(x_0.shape)}
    both = {name: values[name] if name == given else drawn[name]() for name in values}
    assert torch.equal(loss, objective(linear_network, x_0, **both))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["constant", "min_snr"])
def test_network_that_knows_the_image_has_no_loss(prediction_type, weighting):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0 = torch.rand(8, 1, 4, 4) * 2 - 1

    def oracle(x_t, t):
        abar = scheduler.alpha_bar[t].view(-1, 1, 1, 1)
        eps = ((x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()).float()
        return SimpleNamespace(sample=scheduler.training_target(x_0, eps, t))

    loss = Objective(scheduler, weighting=weighting)(oracle, x_0)
    assert loss.max() < 1e-4


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_is_one_weight_on_x_0(prediction_type):
    """Whatever the network predicts, the loss is min(SNR, gamma) |x_0_hat - x_0|^2."""
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    gamma, x_0 = 3.0, torch.rand(16, 1, 4, 4) * 2 - 1
    seen = {}

    def network(x_t, t):
        seen.update(x_t=x_t, output=0.3 * x_t)
        return SimpleNamespace(sample=seen["output"])

    draws = draw(x_0, num_timesteps=100)
    t = draws["timesteps"]
    loss = Objective(scheduler, weighting="min_snr", min_snr_gamma=gamma)(network, x_0, **draws)
    x_0_hat = scheduler.predict_original(seen["output"], seen["x_t"], t)
    expected = scheduler.snr(t).clamp(max=gamma) * (x_0_hat - x_0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("prediction_type", "power"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_of_noise_and_velocity_is_the_published_weight(prediction_type, power):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    t = torch.arange(1000)
    snr = scheduler.snr(t)
    expected = snr.clamp(max=5) / (snr + power)
    weight = Objective(scheduler, weighting="min_snr").weight(t)
    torch.testing.assert_close(weight, expected.float())


@pytest.mark.parametrize("density", ["uniform", "stratified"])
def test_uniform_densities_cover_each_t_alike(density):
    scheduler = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    objective, generator = Objective(scheduler, density=density), seeded()
    draws = torch.cat([objective.timesteps_from_uniform(torch.rand(100, generator=generator)) for _ in range(200)])
    counts = torch.bincount(draws, minlength=10)
    assert counts.shape == (10,)
    # 2,000 of each; independent draws have a standard deviation of 42.
    assert (counts - 2000).abs().max() < (200 if density == "uniform" else 1)


@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.2), (1.0, 0.5)])
def test_lognormal_density_has_log_normal_noise_levels(mean, std):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    objective = Objective(scheduler, density="lognormal", noise_level_mean=mean, noise_level_std=std)
    t = objective.timesteps_from_uniform(torch.rand(20_000, generator=seeded()))
    log_sigma = (1 / scheduler.alpha_bar - 1).log() / 2
    # Cumulative: a tenth of the draws is uniform.
    for level in (-2.0, -1.0, 0.0, 1.0, 2.0):
        normal = torch.special.ndtr(torch.tensor((level - mean) / std))
        uniform = (log_sigma <= level).double().mean()
        assert (log_sigma[t] <= level).double().mean() == pytest.approx(float(0.9 * normal + 0.1 * uniform), abs=3e-3)
    assert torch.bincount(t, minlength=1000).min() > 0


def test_lognormal_density_counts_levels_beyond_the_chain_at_its_ends():
    """The last noise level is infinite here. A tenth of the draws is uniform."""
    scheduler = DDPMScheduler(
        50, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    for mean, t in ((-100.0, 0), (100.0, 49)):
        objective = Objective(scheduler, density="lognormal", noise_level_mean=mean)
        draws = objective.timesteps_from_uniform(torch.rand(5000, generator=seeded()))
        assert torch.bincount(draws, minlength=50).tolist() == [4510 if i == t else 10 for i in range(50)]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "previous_sample"])
def test_min_snr_trains_where_sampling_begins(prediction_type):
    """At zero terminal SNR min(SNR, gamma) is 0 at T - 1; the published code takes 1."""
    scheduler = DDPMScheduler(
        10, prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    weight = Objective(scheduler, weighting="min_snr").weight(torch.arange(10))
    assert scheduler.snr(torch.tensor([9])).item() == 0
    assert weight[9] == 1
    assert (weight > 0).all()


def test_strata_go_around():
    """They may begin anywhere: after the last comes the first."""
    objective, u = Objective(DDPMScheduler(), density="stratified"), torch.rand(8, generator=seeded())
    t = objective.timesteps_from_uniform(u, first_index=6, global_batch_size=8)
    assert (t // 125).tolist() == [6, 7, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("density", ["stratified", "lognormal"])
def test_strata_are_those_of_the_global_batch(density):
    objective, u = Objective(DDPMScheduler(), density=density), torch.rand(8, generator=seeded())
    whole = objective.timesteps_from_uniform(u)
    parts = [objective.timesteps_from_uniform(u[i : i + 4], first_index=i, global_batch_size=8) for i in (0, 4)]
    assert torch.equal(whole, torch.cat(parts))
    if density == "stratified":
        assert torch.equal(whole // 125, torch.arange(8))


@pytest.mark.parametrize("density", ["uniform", "stratified", "lognormal"])
def test_timesteps_are_below_T_for_the_largest_uniform_number(density):
    """(k + u) / G rounds up to 1 for k = G - 1."""
    objective = Objective(DDPMScheduler(), density=density)
    u = torch.tensor([1 - 2**-24])
    assert objective.timesteps_from_uniform(u, first_index=2**20 - 1, global_batch_size=2**20).item() == 999


def test_loss_of_an_image_does_not_depend_on_its_batch():
    scheduler, x_0 = DDPMScheduler(), torch.rand(6, 3, 4, 4) * 2 - 1
    objective, draws = Objective(scheduler), draw(x_0)
    loss = objective(linear_network, x_0, **draws)
    for i in range(6):
        one = slice(i, i + 1)
        loss_i = objective(linear_network, x_0[one], **{name: values[one] for name, values in draws.items()})
        torch.testing.assert_close(loss_i[0], loss[i])


def learned_network(weight):
    return lambda x_t, t: SimpleNamespace(sample=torch.cat([weight[0] * x_t, weight[1] * torch.tanh(x_t)], dim=1))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_hybrid_loss_adds_the_bound_of_the_variance(variance_type):
    """Nichol & Dhariwal Eq. 16: the bound is added with 0.001, over all t, and does not move the mean."""
    x_0 = (torch.rand(8, 1, 4, 4, generator=seeded(5)) * 255).round() / 127.5 - 1
    weight = torch.tensor([0.3, 0.2], requires_grad=True)
    scheduler, draws = DDPMScheduler(variance_type=variance_type), draw(x_0)
    loss = Objective(scheduler)(learned_network(weight), x_0, **draws)
    gradient = torch.autograd.grad(loss.sum(), weight)[0]

    simple = Objective(DDPMScheduler())(lambda x_t, t: SimpleNamespace(sample=weight[0] * x_t), x_0, **draws)
    simple_gradient = torch.autograd.grad(simple.sum(), weight)[0]
    torch.testing.assert_close(gradient[0], simple_gradient[0])
    assert gradient[1].abs() > 0

    t = draws["timesteps"]
    x_t = scheduler.add_noise(x_0, draws["noise"], t)
    bound = variational_bound(scheduler, learned_network(weight)(x_t, t).sample, x_0, x_t, t)
    torch.testing.assert_close(loss, simple + VARIATIONAL_BOUND_WEIGHT * 1000 * bound)


def test_only_the_network_runs_under_autocast():
    linear, seen = torch.nn.Linear(8, 8), {}

    def network(x_t, t):
        seen.update(dtype=x_t.dtype, output=linear(x_t).dtype)
        return SimpleNamespace(sample=linear(x_t))

    x_0 = torch.rand(2, 1, 8, 8) * 2 - 1
    loss = Objective(DDPMScheduler(), autocast_dtype=torch.bfloat16)(network, x_0)
    assert seen == {"dtype": torch.float32, "output": torch.bfloat16}
    assert loss.dtype == torch.float32
    half = Objective(DDPMScheduler())(linear_network, x_0.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "min-snr"}, "weighting must be one of constant, min_snr, got 'min-snr'"),
        ({"density": "even"}, "density must be one of uniform, stratified, lognormal, got 'even'"),
        ({"noise_level_std": 0.0}, "noise_level_std must be above 0, got 0.0"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma must be above 0, got -1.0"),
    ],
)
def test_objective_rejects_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(DDPMScheduler(), **settings)


def test_class_labels_reach_the_network():
    seen = {}

    def network(x_t, t, class_labels):
        seen["labels"] = class_labels
        return SimpleNamespace(sample=x_t)

    labels = torch.tensor([1, 2])
    Objective(DDPMScheduler())(network, torch.zeros(2, 1, 4, 4), labels)
    assert torch.equal(seen["labels"], labels)


def images_and_noise(count, num_extra, seed=0):
    x = torch.rand(count + num_extra, 1, 4, 4, generator=seeded(seed)) * 2 - 1
    return x[:count], torch.randn(count, 1, 4, 4, generator=seeded(seed + 1)), x[count:]


def posterior_mean_of_data(scheduler, x_t, t, points):
    """E[x_0 | x_t] where data are `points` alike, by Bayes' rule in float64."""
    abar = scheduler.alpha_bar[t].double().view(-1, 1)
    distances = (
        (x_t.double().flatten(1)[:, None] - abar[..., None].sqrt() * points.double().flatten(1)).square().sum(2)
    )
    return ((-distances / (2 * (1 - abar))).softmax(1) @ points.double().flatten(1)).view(x_t.shape)


@pytest.mark.parametrize("t", [0, 50, 300, 600, 999])
def test_posterior_means_are_those_of_bayes_rule(t):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    (x_0, eps, extra), t = images_and_noise(5, 40), torch.full((5,), t)
    mean_x_0, mean_eps = posterior_means(scheduler.snr(t), x_0, eps, extra)
    x_t = scheduler.add_noise(x_0, eps, t)
    torch.testing.assert_close(scheduler.add_noise(mean_x_0, mean_eps, t), x_t, rtol=0, atol=1e-5)
    for i in range(5):
        points = torch.cat([x_0[i : i + 1], extra])
        expected = posterior_mean_of_data(scheduler, x_t[i : i + 1], t[i : i + 1], points)
        torch.testing.assert_close(mean_x_0[i : i + 1].double(), expected, rtol=0, atol=1e-5)
    assert (t[0] < 100) == torch.equal(mean_x_0, x_0) == torch.equal(mean_eps, eps)


def test_posterior_means_without_signal_are_those_of_the_data():
    x_0, eps, extra = images_and_noise(3, 7)
    mean_x_0, mean_eps = posterior_means(torch.zeros(3, dtype=torch.float64), x_0, eps, extra)
    torch.testing.assert_close(mean_x_0, (x_0 + extra.sum(0)) / 8)
    assert torch.equal(mean_eps, eps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_network_that_knows_the_data_has_no_loss_with_a_stable_target(prediction_type):
    """The best network's output is the target's expectation; against one image's target it has a loss."""
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    points = images_and_noise(9, 0)[0]

    def best(x_t, t):
        abar = scheduler.alpha_bar[t].view(-1, 1, 1, 1).double()
        x_0 = posterior_mean_of_data(scheduler, x_t, t, points)
        eps = ((x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()).float()
        return SimpleNamespace(sample=scheduler.training_target(x_0.float(), eps, t))

    objective, losses = Objective(scheduler, density="stratified"), {True: [], False: []}
    for i in range(9):
        x_0, extra = points[i : i + 1].expand(40, -1, -1, -1), points[torch.arange(9) != i]
        t = objective.timesteps_from_uniform(torch.rand(40, generator=seeded(i)))
        noise = torch.randn(x_0.shape, generator=seeded(i + 9))
        for stable in losses:
            losses[stable].append(
                objective(best, x_0, timesteps=t, noise=noise, extra_images=extra if stable else None)
            )
    assert torch.cat(losses[True]).max() < 1e-6
    assert torch.cat(losses[False]).mean() > 1e-3


@pytest.mark.parametrize("num_extra", [1, 2, 3])
def test_stable_target_has_the_expectation_of_the_images_own_target(num_extra):
    """The expectation is over the image that x_t came from and over the set of extra images."""
    points = torch.tensor([-0.9, -0.4, -0.3, 0.5, 1.0])
    x_t, snr = 0.2, 4.0
    a, s = math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))
    likelihoods = (-((x_t - a * points) ** 2) / (2 * s**2)).exp()
    expectation = torch.zeros(2)
    for i, x in enumerate(points.tolist()):
        own, eps = torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1, 1), (x_t - a * x) / s)
        sets = list(itertools.combinations([p for p in points.tolist() if p != x], num_extra))
        for extra in sets:
            means = posterior_means(torch.tensor([snr]), own, eps, torch.tensor(extra).view(-1, 1, 1, 1))
            expectation += likelihoods[i] / likelihoods.sum() / len(sets) * torch.stack(means).flatten()
    mean = (likelihoods * points).sum() / likelihoods.sum()
    torch.testing.assert_close(expectation, torch.stack([mean, (x_t - a * mean) / s]))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 128, 128)], ids=str)
def test_posterior_means_tell_near_duplicates_apart_at_small_t(shape):
    """The logarithms of ratios are those of float64, from differences; at snr 1e4 float32 errs by 0.3 to 200."""
    x_0 = (torch.rand(2, *shape, generator=seeded()) * 255).round() / 127.5 - 1
    eps, near = torch.randn(x_0.shape, generator=seeded(1)), x_0[[0, 0, 0, 1]].clone()
    for image, levels in zip(near, (0, 1, 16, 2), strict=True):
        image[0, 0, 0] -= levels / 127.5 * image[0, 0, 0].sign()
    x_i = near.double().flatten(1)
    for snr in (1e4, 100.0, 1e-3):
        mean_x_0, mean_eps = posterior_means(torch.full((2,), snr, dtype=torch.float64), x_0, eps, near)
        for own, noise, mean, mean_noise in zip(x_0, eps, mean_x_0, mean_eps, strict=True):
            own, noise = own.double().flatten(), noise.double().flatten()
            d = x_i - own
            weights = torch.cat([torch.zeros(1), snr**0.5 * d @ noise - snr * d.square().sum(1) / 2]).softmax(0)
            shift = weights[1:] @ d
            torch.testing.assert_close(mean.double().flatten(), own + shift, rtol=0, atol=2e-6)
            expected = noise - snr**0.5 * shift
            torch.testing.assert_close(mean_noise.double().flatten(), expected, rtol=0, atol=1e-4)
        rows = torch.full((2, 1), snr, dtype=torch.float64), x_0.flatten(1), eps.flatten(1), near.flatten(1)
        # A GPU computes all of them in float64.
        whole = objective._log_odds_of_type(*rows, torch.float64)
        torch.testing.assert_close(objective._log_odds(*rows), whole, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("given", [["extra_images", "class_labels"], ["extra_labels"]])
def test_extra_labels_go_with_class_labels(given):
    x_0, labels = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    values = {"extra_images": x_0, "class_labels": labels, "extra_labels": labels}
    with pytest.raises(
        ValueError, match="extra_labels must be given if extra_images and class_labels are, and only then"
    ):
        Objective(DDPMScheduler())(linear_network, x_0, **{name: values[name] for name in given})


def test_stable_target_uses_images_of_the_same_class():
    x_0, noise, extra = images_and_noise(4, 30)
    labels, extra_labels = torch.tensor([0, 1, 0, 1]), torch.arange(30) % 2
    t = torch.tensor([100, 400, 600, 900])

    def network(x_t, t, class_labels=None):
        return SimpleNamespace(sample=torch.zeros_like(x_t))

    objective = Objective(DDPMScheduler(prediction_type="sample"))
    both = objective(network, x_0, labels, timesteps=t, noise=noise, extra_images=extra, extra_labels=extra_labels)
    for label in (0, 1):
        rows = labels == label
        alone = objective(
            network, x_0[rows], timesteps=t[rows], noise=noise[rows], extra_images=extra[extra_labels == label]
        )
        torch.testing.assert_close(both[rows], alone)


def test_stable_target_leaves_noise_and_bound_alone():
    """The variance learns from the image itself."""
    scheduler = DDPMScheduler(variance_type="learned_range")
    x_0, noise, extra = images_and_noise(6, 30)
    x_0 = ((x_0 + 1) * 127.5).round() / 127.5 - 1
    t, seen = draw(x_0)["timesteps"], []

    def network(x_t, t):
        seen.append(x_t)
        return SimpleNamespace(sample=torch.cat([0 * x_t, 0.3 + 0 * x_t], dim=1))

    bounds = []
    for extra_images in (None, extra):
        loss = Objective(scheduler)(network, x_0, timesteps=t, noise=noise, extra_images=extra_images)
        target = noise if extra_images is None else posterior_means(scheduler.snr(t), x_0, noise, extra)[1]
        bounds.append(loss - target.square().flatten(1).mean(1))
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-3, atol=1e-4)
