"""What the tests of sampling share."""

import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler


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
