"""What a run leaves for people, and what its figures take."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import UNet2DModel
from torch.nn.modules.module import register_module_forward_hook

from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.report import reverse_chain_steps

DRAWN = {"loss.png", "forward.png", "reverse.png", "reverse.gif"}


def figures_of(config: TrainingConfig) -> set[str]:
    return {path.name for path in (Path(config.output_dir) / "figures").iterdir()}


@pytest.mark.parametrize("num_steps", [1, 100, 3000, 100_000])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (16, 1), (16, 3)])
def test_reverse_chain_takes_no_longer_than_five_percent_of_the_steps_or_ten_of_them(
    num_steps, batch_size, accumulation
):
    config = TrainingConfig(train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    size = batch_size * accumulation
    run = SimpleNamespace(
        config=config, scheduler=DDPMScheduler(1000), total_images=num_steps * size, global_batch_size=size
    )
    steps = reverse_chain_steps(run, run.total_images)
    # A forward and a backward pass of each micro-batch, in forward passes of two images or fewer.
    cost_of_a_step = 3 * accumulation * min(batch_size, 2) / 2
    assert 1 <= steps <= max(0.05 * num_steps, 10) * cost_of_a_step
    assert steps == 1000 or steps + 1 > max(0.05 * num_steps, 10) * cost_of_a_step


@pytest.mark.slow
def test_end_of_a_run_evaluates_the_network_no_more_often_than_it_says(tiny_settings, capsys):
    config = TrainingConfig(
        **{**tiny_settings, "ddpm_num_steps": 1000, "max_train_steps": 2, "eval_batch_size": 4, "save_figures": True}
    )
    batch_sizes = []

    def count(module, inputs, _):
        if isinstance(module, UNet2DModel) and not module.training:
            batch_sizes.append(len(inputs[0]))

    handle = register_module_forward_hook(count)
    try:
        train(config)
    finally:
        handle.remove()
    assert batch_sizes.count(2) == 30
    assert "2 samples in 30 of 1,000 sampling steps (--no_save_figures leaves them out)" in capsys.readouterr().err
    assert figures_of(config) == {"samples.png", *DRAWN}
    assert (
        "from left to right, here in 30 of its 1000 steps. The rows"
        in Path(config.output_dir, "README.md").read_text()
    )


@pytest.mark.slow
def test_no_figures_are_drawn_where_none_are_asked_for(tiny_settings):
    config = TrainingConfig(**{**tiny_settings, "save_figures": False, "max_train_steps": 1})
    train(config)
    assert figures_of(config) == {"samples.png"}
    card = (Path(config.output_dir) / "README.md").read_text()
    assert "(figures/samples.png)" in card
    assert not any(name in card for name in DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize(("num_train", "drawn"), [(30, DRAWN), (31, {"loss.png", "forward.png"})])
def test_chain_of_a_step_denoiser_is_drawn_whole_or_not_at_all(tiny_settings, num_train, drawn):
    changes = {"ddpm_num_steps": num_train, "prediction_type": "previous_sample", "save_figures": True}
    config = TrainingConfig(**{**tiny_settings, **changes, "max_train_steps": 1, "ddpm_num_inference_steps": None})
    train(config)
    assert figures_of(config) == {"samples.png", *drawn}
