"""The scheduler beside stock: equal where stock is right, and right where stock is wrong."""

import json
import warnings
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch

from hf_ddpm.scheduler import STOCK_VARIANCES, DDPMScheduler

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"])
def test_tables_agree_with_stock(schedule):
    # laplace and scaled_linear end far from noise at their default ends, of which a warning tells.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours, stock = DDPMScheduler(beta_schedule=schedule), diffusers.DDPMScheduler(beta_schedule=schedule)
    torch.testing.assert_close(ours.beta.float(), stock.betas, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(ours.alpha_bar.float(), stock.alphas_cumprod, rtol=5e-4, atol=1e-7)


def run_chain(scheduler, steps, seed=0, **step_arguments):
    """A full run with a nonlinear stand-in for the network; x_t after each step."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    seen = []
    channels = 2 if scheduler.config.variance_type == "learned_range" else 1
    for t in scheduler.timesteps:
        output = torch.cat([torch.tanh(x + 0.001 * t)] * channels, dim=1)
        x = scheduler.step(output, t, x, generator=generator, **step_arguments).prev_sample
        seen.append(x)
    return torch.stack(seen)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_steps_equal_stock_bit_for_bit(prediction_type, variance_type):
    settings = {"prediction_type": prediction_type, "variance_type": variance_type}
    ours = run_chain(DDPMScheduler(**settings), 1000)
    stock = run_chain(diffusers.DDPMScheduler(**settings), 1000)
    assert torch.equal(ours, stock)


def test_fewer_and_thresholded_steps_equal_stock_bit_for_bit():
    all_settings: list[dict[str, Any]] = [
        {},
        {"thresholding": True},
        {"clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2"},
    ]
    for settings in all_settings:
        assert torch.equal(
            run_chain(DDPMScheduler(**settings), 50), run_chain(diffusers.DDPMScheduler(**settings), 50)
        )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", STOCK_VARIANCES)
@pytest.mark.parametrize("steps", [1000, 20])
def test_own_arithmetic_agrees_with_stock(prediction_type, variance_type, steps):
    """`step` takes stock's arithmetic for a scalar t and the formulas of this project for a batch of them."""
    settings = {"prediction_type": prediction_type, "variance_type": variance_type, "beta_schedule": "linear"}
    scheduler = DDPMScheduler(**settings)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    for t in scheduler.timesteps[[0, 1, steps // 2, -2, -1]]:
        x = torch.randn(2, 1, 4, 4, generator=generator)
        output = torch.randn(2, 2 if variance_type == "learned_range" else 1, 4, 4, generator=generator)
        scalar, batched = (
            scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(7)).prev_sample
            for timestep in (t, t.expand(2))
        )
        torch.testing.assert_close(scalar, batched, rtol=2e-4, atol=2e-4)


# Each test below keeps out a fault of stock, and would fail on the stock scheduler.


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_no_variance_type_gives_nan(variance_type):
    generator = torch.Generator().manual_seed(0)
    for make in (DDPMScheduler, diffusers.DDPMScheduler):
        scheduler: Any = make(variance_type=variance_type)
        scheduler.set_timesteps(10)
        x = torch.randn(2, 1, 4, 4, generator=generator)
        for t in scheduler.timesteps:
            channels = 2 if variance_type == "learned" else 1
            output = torch.full((2, channels, 4, 4), -0.5)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        assert bool(x.isfinite().all()) == (make is DDPMScheduler)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("num_train", [1000, 361, 100, 7])
@pytest.mark.filterwarnings("ignore:alpha_bar_T", "ignore:sampling starts")
def test_set_timesteps_gives_each_number_of_steps(spacing, num_train):
    scheduler = DDPMScheduler(num_train, timestep_spacing=spacing)
    for n in range(1, num_train + 1):
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == n
        assert all(a > b for a, b in pairwise(timesteps))
        assert num_train > timesteps[0] >= num_train - -(-num_train // n)
        assert timesteps[-1] >= 0
        if spacing != "leading":
            assert timesteps[0] == num_train - 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sampling starts")
def test_timesteps_equal_stock_where_stock_is_right():
    differing = {}
    for spacing in ("linspace", "leading", "trailing"):
        ours, stock = DDPMScheduler(timestep_spacing=spacing), diffusers.DDPMScheduler(timestep_spacing=spacing)
        differing[spacing] = []
        for n in range(1, 1001):
            ours.set_timesteps(n)
            stock.set_timesteps(n)
            if ours.timesteps.tolist() != stock.timesteps.tolist():
                differing[spacing].append(n)
                assert spacing != "trailing" or len(stock.timesteps) == n + 1
    # Stock's single linspace step is t = 0; leading strides round down; 62 trailing lists are one too long.
    assert differing["linspace"] == [1]
    assert all(1000 % n for n in differing["leading"])
    assert len(differing["trailing"]) == 62


def test_leading_warns_if_it_starts_too_late():
    scheduler = DDPMScheduler()
    with pytest.warns(UserWarning, match=r"starts from N\(0, I\) at t=500, .*timestep_spacing='trailing'"):
        scheduler.set_timesteps(2)
    scheduler.set_timesteps(50)


def test_last_step_adds_no_noise():
    for make in (DDPMScheduler, diffusers.DDPMScheduler):
        scheduler: Any = make(variance_type="fixed_large", timestep_spacing="trailing", prediction_type="sample")
        scheduler.set_timesteps(10)
        x_0_hat = torch.zeros(1, 1, 32, 32)
        last = scheduler.timesteps[-1]
        x = scheduler.step(x_0_hat, last, x_0_hat, generator=torch.Generator().manual_seed(0)).prev_sample
        assert x.std().item() == (0 if make is DDPMScheduler else pytest.approx(0.32, abs=0.02))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_noise_adds_noise_to_half_precision_at_each_t(dtype):
    t = torch.arange(10)
    x_0, eps = torch.zeros(10, 1, 4, 4, dtype=dtype), torch.ones(10, 1, 4, 4, dtype=dtype)
    ours = DDPMScheduler()
    stock: Any = diffusers.DDPMScheduler()
    x_t = ours.add_noise(x_0, eps, t)
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t.float(), ours.add_noise(x_0.float(), eps.float(), t), rtol=1e-2, atol=0)
    assert (x_t > 0).all()
    assert not (stock.add_noise(x_0, eps, t) > 0).all()
    velocity = ours.get_velocity(eps, x_0, t)
    torch.testing.assert_close(velocity.float(), ours.get_velocity(eps.float(), x_0.float(), t), rtol=1e-2, atol=0)


def test_zero_terminal_snr_ends_in_pure_noise():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert scheduler.alpha_bar[-1] == 0
    x_0, eps = torch.ones(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    assert torch.equal(scheduler.add_noise(x_0, eps, 999), eps)
    assert run_chain(scheduler, 20).isfinite().all()


def test_config_keeps_arguments_given_by_position():
    ours = DDPMScheduler(100, 0.001, 0.2)
    stock = diffusers.DDPMScheduler(100, 0.001, 0.2)
    made = {s: diffusers.DDIMScheduler.from_config(s.config).config.num_train_timesteps for s in (ours, stock)}
    assert (made[ours], made[stock]) == (100, 1000)
    other = diffusers.DPMSolverMultistepScheduler.from_config(
        DDPMScheduler(steps_offset=1, prediction_type="sample").config
    )
    assert (other.config.steps_offset, other.config.prediction_type) == (1, "sample")


def test_config_survives_stock(tmp_path):
    ours = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    stock = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    again = DDPMScheduler.from_config(stock.config)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
