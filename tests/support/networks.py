"""Networks that are small enough for a test."""

from __future__ import annotations


def tiny_unet_config(channels: int = 3, size: int = 8, **changes) -> dict:
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        **changes,
    }


ATTENTION = {"mid_block_type": "UNetMidBlock2D"}


def smallest_unet_config(channels: int = 3, **changes) -> dict:
    """One level and no middle, for what a run does with a network, whichever it is; `ATTENTION` adds a middle."""
    one_level = {
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
    }
    return {**tiny_unet_config(channels), **one_level, **changes}
