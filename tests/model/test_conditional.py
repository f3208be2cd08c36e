"""The pipeline that makes images from images, with networks whose answer is known."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.condition import Condition
from hf_ddpm.conditional import Conditioned, enlarged
from hf_ddpm.guidance import Guidance
from tests.support.image_data import noise
from tests.support.networks import smallest_unet_config


def network(channels=1, condition_channels=1, **changes):
    config = smallest_unet_config(channels, in_channels=channels + condition_channels, **changes)
    torch.manual_seed(0)
    return UNet2DModel(**config).eval()


def copying_network(size=8):
    """A network that predicts x_0 as its condition: the last channel of its input, by one convolution."""
    unet = network(sample_size=size)
    unet.forward = lambda network_input, t, **_: type("Output", (), {"sample": network_input[:, 1:]})()
    return unet


def pipeline_of(unet, **scheduler):
    pipeline = ConditionalDDPMPipeline(unet, DDPMScheduler(10, beta_schedule="squaredcos_cap_v2", **scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_condition_reaches_the_network_beside_x_t():
    pipeline = pipeline_of(copying_network(), prediction_type="sample")
    pictures = [Image.fromarray(noise(8, 8, seed=i)) for i in range(3)]
    samples = pipeline(pictures).images
    # The last step returns x_0_hat, which is the condition.
    assert all(np.abs(np.array(a, int) - np.array(b, int)).max() <= 1 for a, b in zip(samples, pictures, strict=True))


def test_gray_pictures_of_16_bits_are_taken_as_in_training():
    pipeline = pipeline_of(copying_network(), prediction_type="sample")
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for image in (Image.fromarray(values), [Image.fromarray(values)]):
        assert torch.equal(pipeline.to_conditions(image)[0, 0], torch.from_numpy(values.astype(np.float32) / 65535))


def test_low_resolution_is_enlarged_as_in_training():
    pipeline = pipeline_of(copying_network(), prediction_type="sample")
    pipeline.condition = Condition(1, super_resolution=2)
    small = noise(4, 4)
    wanted = enlarged(torch.from_numpy(small)[None, None] / 255, 8, 8)
    for image in (Image.fromarray(small), small, torch.from_numpy(small), small[None, :, :, None], [small]):
        (got,) = pipeline(image, output_type="pt", return_dict=False)
        assert torch.allclose(got, wanted, atol=1e-5)
    # An image of the model's size is taken as it is.
    whole = torch.rand(2, 1, 8, 8)
    assert torch.allclose(pipeline(whole, output_type="pt").images, whole, atol=1e-5)


def test_guided_network_gets_the_condition_in_both_halves():
    unet = network(num_class_embeds=3)
    seen = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pipeline = pipeline_of(unet, timestep_spacing="trailing")
    pipeline.classes = Classes(("a", "b"), has_unconditional=True)
    image = torch.rand(2, 1, 8, 8)
    pipeline(image, class_labels=["a", "b"], guidance=Guidance(2.0), num_inference_steps=1, output_type="pt")
    assert torch.equal(seen[0][:, 1:], torch.cat([2 * image - 1] * 2))
    assert torch.equal(seen[0][:2, :1], seen[0][2:, :1])


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_saved_pipeline_is_loaded_with_its_condition(tmp_path, variance_type):
    outputs = 2 if variance_type == "learned_range" else 1
    pipeline = pipeline_of(network(1, 3, out_channels=outputs), variance_type=variance_type)
    assert pipeline.condition == Condition(3)
    pipeline.condition = Condition(3, column="edges", noise=0.1)
    pipeline.save_pretrained(tmp_path)
    loaded = ConditionalDDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.condition == pipeline.condition
    assert type(loaded.scheduler) is DDPMScheduler
    image = torch.rand(1, 3, 8, 8)
    images = [
        each(image, generator=torch.Generator().manual_seed(0), output_type="pt").images for each in (pipeline, loaded)
    ]
    assert images[0].shape == (1, 1, 8, 8)
    assert torch.equal(*images)


def test_wrapped_network_is_called_with_both():
    wrapped = Conditioned(lambda both, t, class_labels: (both, t, class_labels), torch.ones(2, 3, 4, 4))
    both, t, labels = wrapped(torch.zeros(2, 1, 4, 4), 5, class_labels=7)
    assert (t, labels) == (5, 7)
    assert both.sum(dim=(0, 2, 3)).tolist() == [0, 32, 32, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "image must be given"),
        ({"image": torch.rand(1, 1, 8, 8), "batch_size": 1}, "batch_size must be left out"),
        ({"image": torch.rand(1, 1, 4, 4)}, "image must be 8 pixels high"),
        ({"image": torch.rand(1, 3, 8, 8)}, "number of channels, 1, got 3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(network())(**arguments)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="conditional_unet must take more channels"):
        pipeline_of(UNet2DModel(**smallest_unet_config(1)))
    with pytest.raises(ValueError, match="trained for another task"):
        DDPMPipeline(network(), DDPMScheduler())()
    with pytest.raises(ValueError, match="must have a unet"):
        DDPMPipeline.from_pipe(pipeline_of(network()))
