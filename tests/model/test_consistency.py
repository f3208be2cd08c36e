"""The objective that tunes a model for few steps: its teacher's path, its neighbors, and images of a known path."""

from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from hf_ddpm import DDPMScheduler
from hf_ddpm.conditional import Conditioned
from hf_ddpm.consistency import ConsistencyObjective, visited_timesteps
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.scheduler import complete_config
from hf_ddpm.solvers import tuned_scheduler
from tests.support.gaussian import gaussian_network, smooth_covariance

SIDE = 4
COVARIANCE = smooth_covariance(SIDE)


def make_scheduler(**settings: Any) -> DDPMScheduler:
    return DDPMScheduler(
        # Images of a normal distribution have no bound to clip to.
        **{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False} | settings,
        timestep_spacing="trailing",
    )


def end_of_path(scheduler: DDPMScheduler, x_t: Tensor, t: Tensor) -> Tensor:
    """The image at the end of the path of x_t for images of N(0, COVARIANCE): each of its modes is scaled."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    alpha_bar = scheduler.alpha_bar[t][:, None, None]
    scale = (values / (alpha_bar * values + 1 - alpha_bar)).sqrt()
    return ((x_t.double().flatten(1)[:, None] @ vectors * scale) @ vectors.T).view(x_t.shape).to(x_t.dtype)


def make_objective(scheduler: DDPMScheduler | None = None, num_steps: tuple[int, ...] = (1, 2, 4)) -> Any:
    """An objective whose teacher is exact for images of N(0, COVARIANCE)."""
    scheduler = scheduler or make_scheduler()
    network = gaussian_network(COVARIANCE, scheduler.alpha_bar, scheduler.config.prediction_type)

    def teacher(x_t: Tensor, t: Tensor, class_labels: Tensor | None, condition: Tensor | None) -> Tensor:
        return network(x_t, t).sample

    return ConsistencyObjective(scheduler, teacher=teacher, visited=visited_timesteps(scheduler, num_steps))


def gaussian_images(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(count, SIDE**2, generator=generator, dtype=torch.float64)
    return (white @ torch.linalg.cholesky(COVARIANCE).T).view(count, 1, SIDE, SIDE).float()


def noised(objective: Any, count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    t = objective.timesteps_from_uniform(torch.rand(count, generator=generator))
    eps = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return objective.scheduler.add_noise(gaussian_images(count), eps, t), t


@pytest.mark.parametrize("settings", [{"rescale_betas_zero_snr": True}, {}])
@pytest.mark.parametrize("num_train", [4, 8, 20])
def test_few_timesteps_and_none_of_signal_give_finite_losses(num_train: int, settings: dict[str, bool]):
    objective = make_objective(make_scheduler(num_train_timesteps=num_train, **settings), (1, num_train))
    assert objective(Exact(objective.scheduler), gaussian_images(), timesteps=None).isfinite().all()


@pytest.mark.parametrize("num_train", [1000, 30, 4])
@pytest.mark.parametrize("num_steps", [(1,), (2,), (4,), (1, 2, 4), (3,)])
def test_visited_timesteps_are_those_that_stock_samples_at(num_train: int, num_steps: tuple[int, ...]):
    scheduler = make_scheduler(num_train_timesteps=num_train)
    visited = visited_timesteps(scheduler, num_steps)
    assert [*visited] == sorted({*visited})
    for n in (*num_steps, 4):
        stock = LCMScheduler(num_train_timesteps=num_train, original_inference_steps=num_train)
        stock.set_timesteps(n)
        assert {*stock.timesteps.tolist()} <= {*visited}
    assert len(visited) <= 4 + sum(num_steps)


def test_each_timestep_is_drawn_as_often_and_has_the_one_before_it_as_neighbor():
    objective = make_objective()
    assert objective.visited == (249, 499, 749, 999)
    t = torch.cat(
        [
            objective.timesteps_from_uniform(torch.rand(8), first_index=first, global_batch_size=32)
            for first in range(0, 32, 8)
        ]
    )
    assert {value: int((t == value).sum()) for value in objective.visited} == dict.fromkeys(objective.visited, 8)
    assert objective.neighbor(torch.tensor([999, 249, 499, 749])).tolist() == [749, -1, 249, 499]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_teacher_goes_along_the_path(prediction_type: str, monkeypatch: pytest.MonkeyPatch):
    """Images of a normal distribution have a path in closed form, to which the solver comes by the second order."""
    objective = make_objective(make_scheduler(prediction_type=prediction_type))
    x_t, t = noised(objective)
    end = end_of_path(objective.scheduler, x_t, t)
    errors = []
    for num_substeps in (1, 4, 32):
        monkeypatch.setattr("hf_ddpm.consistency.NUM_SUBSTEPS", num_substeps)
        x, s = x_t, t
        while bool((s >= 0).any()):  # from neighbor to neighbor, until each is an image
            following = torch.where(s < 0, s, objective.neighbor(s.clamp(min=0)))
            point = objective.point_of_path(x, s.clamp(min=0), following)
            x, s = torch.where((s < 0).view(-1, 1, 1, 1), x, point), following
        errors.append(float((x - end).square().mean().sqrt()))
    # Of first order, 4 substeps would have a third of the error of one, and 32 a seventh of that.
    assert errors[0] > 8 * errors[1]
    assert errors[1] > 16 * errors[2]


class Exact:
    """A network whose x_0_hat is the image at the end of the path; it notes what it was given."""

    def __init__(self, scheduler: DDPMScheduler):
        self.scheduler, self.drawn = scheduler, []

    def __call__(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        self.drawn.append(float(torch.rand(())))
        x_0 = end_of_path(self.scheduler, x_t, t)
        alpha_bar = self.scheduler.alpha_bar[t].view(-1, 1, 1, 1)
        v = (alpha_bar.sqrt() * x_t - x_0) / (1 - alpha_bar).sqrt()
        return UNet2DOutput(sample=v.float())


def test_consistency_function_of_the_path_has_less_loss_than_the_teacher(monkeypatch: pytest.MonkeyPatch):
    objective, x_0 = make_objective(), gaussian_images()
    network = gaussian_network(COVARIANCE, objective.scheduler.alpha_bar, "v_prediction")
    torch.manual_seed(0)
    of_teacher = objective(network, x_0).mean()
    losses = []
    for num_substeps in (4, 32):
        monkeypatch.setattr("hf_ddpm.consistency.NUM_SUBSTEPS", num_substeps)
        torch.manual_seed(0)
        losses.append(float(objective(Exact(objective.scheduler), x_0).mean()))
    assert of_teacher > 5 * losses[0] > 10 * losses[1]


def test_both_evaluations_draw_the_same_and_the_target_has_no_gradient():
    objective, x_0 = make_objective(), gaussian_images(8)
    network = Exact(objective.scheduler)
    t, noise = torch.full((8,), 749), torch.randn(8, 1, SIDE, SIDE)
    torch.manual_seed(0)
    expected = float(torch.rand(()))
    torch.manual_seed(0)
    objective(network, x_0, timesteps=t, noise=noise)
    assert network.drawn == [expected, expected]

    factor = torch.tensor(1.0, requires_grad=True)
    of_first = []

    def scaled(x_t: Tensor, t: Tensor) -> UNet2DOutput:
        of_first.append(torch.is_grad_enabled())
        return UNet2DOutput(sample=network(x_t, t).sample * factor)

    objective(scaled, x_0, timesteps=t, noise=noise).mean().backward()
    assert of_first == [False, True]
    assert factor.grad is not None
    assert factor.grad.isfinite()


def test_the_last_timestep_has_the_image_of_the_teacher_as_target():
    """Of t = 249, whose neighbor is the image itself, the tuned network is not evaluated for the target."""
    objective, x_0 = make_objective(), gaussian_images(4)
    noise, t = torch.randn(4, 1, SIDE, SIDE), torch.full((4,), 249)
    x_t = objective.scheduler.add_noise(x_0, noise, t)
    target = objective.point_of_path(x_t, t, torch.full((4,), -1))
    loss = objective(Exact(objective.scheduler), x_0, timesteps=t, noise=noise)
    squares = (end_of_path(objective.scheduler, x_t, t) - target).square().flatten(1).mean(dim=1)
    squares = squares * (1 + objective.scheduler.snr(t))
    torch.testing.assert_close(loss, ((squares + 0.03**2).sqrt() - 0.03).float(), rtol=1e-4, atol=1e-6)


def test_teacher_and_target_are_clipped_as_samples_are():
    objective = make_objective(make_scheduler(clip_sample=True, clip_sample_range=0.1))
    x_t, t = noised(objective)
    assert objective.point_of_path(x_t, t, torch.full_like(t, -1)).abs().max() <= 0.1
    x_0, noise = gaussian_images(4), torch.randn(4, 1, SIDE, SIDE)
    t = torch.full((4,), 999)
    clipped = objective(Exact(objective.scheduler), x_0, timesteps=t, noise=noise)
    x_t = objective.scheduler.add_noise(x_0, noise, t)
    x_s = objective.point_of_path(x_t, t, torch.full((4,), 749))
    target = end_of_path(objective.scheduler, x_s, torch.full((4,), 749)).clamp(-0.1, 0.1)
    squares = (end_of_path(objective.scheduler, x_t, t) - target).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(clipped, ((squares + 0.03**2).sqrt() - 0.03).float(), rtol=1e-3, atol=1e-5)


def test_teacher_sees_the_condition_of_the_network():
    scheduler, seen = make_scheduler(), []

    def teacher(x_t: Tensor, t: Tensor, class_labels: Tensor | None, condition: Tensor | None) -> Tensor:
        seen.append((class_labels, condition))
        return torch.zeros_like(x_t)

    objective = ConsistencyObjective(scheduler, teacher=teacher, visited=(999,))
    condition, labels = torch.ones(2, 3, SIDE, SIDE), torch.tensor([0, 1])

    def network(both: Tensor, t: Tensor, class_labels: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=both[:, :1])

    objective(Conditioned(network, condition), gaussian_images(2), labels)
    assert all(given is labels and told is condition for given, told in seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type must be v_prediction or sample .*, got epsilon"),
        ({"variance_type": "learned_range"}, "variance_type must be fixed .*, got learned_range"),
        ({"beta_schedule": "sigmoid"}, "ddpm_beta_schedule must be one of linear, .*, got sigmoid"),
    ],
)
def test_models_that_lcm_cannot_sample_are_refused(settings: dict[str, str], message: str):
    with pytest.raises(UsageError, match=message):
        ConsistencyObjective(make_scheduler(**settings))


def test_extra_images_are_refused():
    objective = make_objective()
    with pytest.raises(ValueError, match="extra_images must be None"):
        objective(Exact(objective.scheduler), gaussian_images(4), extra_images=gaussian_images(4))


def test_tuned_scheduler_of_a_tuned_scheduler_is_the_same():
    scheduler = tuned_scheduler(make_scheduler().config)
    again = tuned_scheduler(scheduler.config)
    assert complete_config(again.config) == complete_config(scheduler.config)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), make_scheduler().alpha_bar, rtol=1e-4, atol=1e-12)
