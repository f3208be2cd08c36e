"""Attention of networks that are compiled for a CPU."""

import warnings

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from hf_ddpm.network import compile_network, use_plain_attention
from hf_ddpm.network_config import sized_config

CPU = torch.device("cpu")


def processors(unet):
    return {type(module.processor) for module in unet.modules() if hasattr(module, "processor")}


def test_plain_attention_gives_the_same_output():
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(sized_config((16, 16), 1, 1)).eval()
    x_t, t = torch.randn(3, 1, 16, 16), torch.tensor([5, 500, 999])
    with torch.no_grad():
        before = unet(x_t, t).sample
        assert processors(unet) == {AttnProcessor2_0}
        use_plain_attention(unet, CPU)
        assert processors(unet) == {AttnProcessor}
        torch.testing.assert_close(unet(x_t, t).sample, before)


@pytest.mark.parametrize("block_types", ["down_block_types", "up_block_types"])
def test_plain_attention_is_not_used_for_many_pixels(block_types):
    settings = {**sized_config((28, 28), 1, 1), "attention_head_dim": 32}
    kinds = settings[block_types]
    level = 0 if block_types == "down_block_types" else len(kinds) - 1
    settings[block_types] = [f"Attn{k}" if i == level else k for i, k in enumerate(kinds)]
    unet = UNet2DModel.from_config(settings)
    use_plain_attention(unet, CPU)
    assert processors(unet) == {AttnProcessor2_0}


def test_plain_attention_is_not_used_on_other_devices():
    unet = UNet2DModel.from_config(sized_config((28, 28), 1, 1))
    use_plain_attention(unet, torch.device("cuda"))
    assert processors(unet) == {AttnProcessor2_0}


def test_compiled_hides_the_warning_about_diffusers_upsampling(make_unet, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    unet = make_unet()
    compile_network(unet.forward, unet, CPU)
    text = "Dynamo detected a call to a `functools.lru_cache`-wrapped function"
    # The words of torch 2.13, and those of earlier ones.
    for rest in (" at 'upsampling.py:156'. Dynamo ignores the cache wrapper", ". Dynamo ignores the cache wrapper"):
        warnings.warn(text + rest, UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="mine"):
        warnings.warn(text + " at 'mine.py:7'. Dynamo ignores the cache wrapper", UserWarning, stacklevel=1)
