"""Schedulers by name, and images as a function of their seed."""

import subprocess
import sys

import diffusers
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.sampling import SCHEDULERS, default_scheduler, named_scheduler, sample_images


@pytest.fixture
def pipeline(make_unet):
    unet = make_unet()
    # Outputs of a trained network's size; those of a random one send rounding errors across the whole range.
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
    scheduler = DDPMScheduler(
        20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:sampling starts")
def test_each_named_scheduler_has_exact_steps(name):
    config = DDPMScheduler(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2").config
    for n in (1, 2, 3, 20, 61, 103, 501, 600, 999, 1000):
        scheduler = named_scheduler(name, config, n)
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len(set(timesteps)) == len(timesteps) == n
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0


def run(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    return x


def test_ddim_is_diffusers_ddim_where_its_steps_are_right():
    """Trailing steps that divide T evenly are t - T // n apart, as diffusers' DDIM assumes of all."""
    config = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
    ddim = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(run(named_scheduler("ddim", config, 1000), 1000), run(ddim, 1000), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_an_imperfect_noise_predictor_stays_in_range(name):
    """At the end of a cosine schedule x_0_hat magnifies an error of eps_hat 20,000 times: the solvers must clip it."""
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    reference = DDPMScheduler.from_config(config)
    scheduler, mu = named_scheduler(name, config, 20), 0.5
    scheduler.set_timesteps(20)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        abar = reference.alpha_bar[t].float()
        # A network knows no inputs far from those of training.
        seen = x.clamp(-5, 5)
        eps_hat = (seen - abar.sqrt() * mu) / (1 - abar).sqrt() + 0.02 * torch.sin(7 * seen)
        x = scheduler.step(eps_hat, t, x).prev_sample
    assert (x - mu).abs().max() < 0.1


def test_schedules_that_the_solvers_do_not_know_are_left_to_ddpm():
    config = DDPMScheduler(beta_schedule="sigmoid").config
    assert default_scheduler(config) == "ddpm"
    with pytest.raises(ValueError, match=r"must be 'ddpm' for the noise schedule 'sigmoid', got 'unipc'"):
        named_scheduler("unipc", config)


def test_step_denoisers_are_sampled_by_their_own_chain():
    config = DDPMScheduler(prediction_type="previous_sample").config
    assert type(named_scheduler("ddpm", config)) is DDPMScheduler
    with pytest.raises(ValueError, match=r"scheduler must be 'ddpm' for a step denoiser.*got 'ddim'"):
        named_scheduler("ddim", config)
    with pytest.raises(ValueError, match=r"scheduler must be one of ddpm, ddim, dpmsolver\+\+, unipc, got 'euler'"):
        named_scheduler("euler", config)


def test_an_image_is_a_function_of_its_seed(pipeline):
    whole = sample_images(pipeline, range(5), batch_size=5)
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(sample_images(pipeline, range(5), batch_size=batch_size), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(sample_images(pipeline, [3], batch_size=1)[0], whole[3], rtol=0, atol=1e-4)


def hf_ddpm(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", "from hf_ddpm.cli import app; app()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_samples(pipeline, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    pipeline.save_pretrained(model)
    done = hf_ddpm("sample", model, "--num_images", 3, "--seed", 7, "--num_inference_steps", 5, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["000007.png", "000008.png", "000009.png", "grid.png"]
    pipeline.scheduler = named_scheduler("dpmsolver++", pipeline.scheduler.config, 5)
    expected = sample_images(pipeline, [8], batch_size=1, num_inference_steps=5)
    with Image.open(out / "000008.png") as image:
        got = torch.tensor(list(image.tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(got, expected[0], rtol=0, atol=1.01 / 255)

    again = hf_ddpm("sample", model, "--num_images", 3, "--seed", 7, "--out", out)
    assert again.returncode == 1
    assert "would be overwritten: choose another folder" in again.stderr


def test_command_line_refuses_what_cannot_work(tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path], "must be a folder with model_index.json"),
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path, "--scheduler", "euler"], "euler"),
    ):
        done = hf_ddpm("sample", *arguments, "--out", out)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not out.exists()
