"""Each scheduler that diffusers exports samples images of the right mean and spread, or is refused by its name."""

from importlib.util import find_spec

import diffusers
import pytest
import torch

from benchmarks.schedulers.run import NETWORK as SETTINGS
from benchmarks.schedulers.run import Exact, is_right, make_pipeline, mean_and_spread, scheduler_classes
from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.pipeline import SAMPLING_SCHEDULERS

CLASSES = {cls.__name__: cls for cls in scheduler_classes()}
SAMPLED = sorted(CLASSES.keys() & set(SAMPLING_SCHEDULERS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLED)
def test_scheduler_samples_the_mean_and_spread_of_the_data(name):
    if name == "DPMSolverSDEScheduler" and find_spec("torchsde") is None:
        pytest.skip("diffusers needs torchsde for it, which this package does not")
    assert is_right(*mean_and_spread(make_pipeline(CLASSES[name])))


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - set(SAMPLING_SCHEDULERS)))
def test_scheduler_for_something_else_is_refused_by_name(name):
    pipeline = make_pipeline(DDPMScheduler)
    # An LCMScheduler samples models that were tuned for few steps, whose config says so.
    pipeline.scheduler = CLASSES[name]() if name == "LCMScheduler" else object.__new__(CLASSES[name])
    with pytest.raises(ValueError, match=f"^scheduler must be one that samples this network from noise, got {name}, "):
        pipeline()


@pytest.mark.parametrize("name", [name for name in SAMPLED if "Flow" not in name and "RF" not in name])
def test_from_config_takes_the_noise_schedule_of_the_model(name):
    """Also where it has the defaults, which other classes have others of."""
    if name == "DPMSolverSDEScheduler" and find_spec("torchsde") is None:
        pytest.skip("diffusers needs torchsde for it, which this package does not")
    ours = DDPMScheduler()
    theirs = CLASSES[name].from_config(ours.config)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alpha_bar, rtol=1e-5, atol=0)
    assert theirs.config.timestep_spacing == ours.config.timestep_spacing


def test_list_names_schedulers_of_diffusers():
    assert len(CLASSES) > 40
    assert len(SAMPLED) == len(SAMPLING_SCHEDULERS)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_scheduler_that_begins_in_nearly_pure_noise_is_refused(name, spacing):
    """The cosine schedule ends at alpha_bar = 2.4e-9, from where these two sample noise of two values."""
    cosine = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
    pipeline = DDPMPipeline(Exact(**SETTINGS), CLASSES[name].from_config(cosine.config))
    pipeline.set_progress_bar_config(disable=True)
    if spacing == "leading":
        assert pipeline(num_inference_steps=10, output_type="pt").images.isfinite().all()
        return
    with pytest.raises(ValueError, match=f"^{name} gives noise of two values where alpha_bar = 2.4e-09"):
        pipeline(num_inference_steps=10)


def test_scheduler_of_ones_own_is_not_refused():
    class Mine(diffusers.DDIMScheduler):
        pass

    pipeline = make_pipeline(Mine)
    assert torch.isfinite(pipeline(num_inference_steps=2, output_type="pt").images).all()
