"""The network: a `UNet2DModel` from a config, or one that is sized for the data.

level   one resolution of the network; L levels halve the input L - 1 times
head    one part of an attention layer, HEAD_CHANNELS wide
group   channels that are normalized together

Sized for the data, a network differs from diffusers' defaults in four points. The lowest level is 4 to 8 pixels wide,
and levels of at most 16 pixels attend. Heads have 64 channels: with diffusers' default of 8, attention takes half of a
training step on a CPU. The timestep scales and shifts what a block has normalized (Nichol & Dhariwal 2021, App. A);
by default it only shifts. A group has at least 4 channels: with diffusers' 32 groups, each channel of a level of 32
is normalized alone and loses its mean and scale.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from hf_ddpm import recipes
from hf_ddpm.runtime.errors import UsageError

HEAD_CHANNELS = 64
MAX_ATTENTION_PIXELS = 16
MIN_GROUP_CHANNELS = 4


def make_unet(
    channels: int,
    resolution: int,
    num_classes: int | None = None,
    *,
    model_config: str | None = None,
    variance_type: str = "fixed_small",
    dropout: float | None = None,
    seed: int = 0,
) -> UNet2DModel:
    """Make a new network for images of `channels` x `resolution` x `resolution`.

    The last convolution starts at zero, while diffusers leaves it random. The first prediction is then 0, and the
    first loss is the power of the target.

    Args:
        channels: The channels of the images.
        resolution: The height and width of the images.
        num_classes: The number of classes that the network is conditioned on; None: it is unconditional.
        model_config: The config of a UNet2DModel: a JSON file, a folder, the name of a recipe or a Hub id; None: the
            network is sized for the data.
        variance_type: The scheduler's variance type; `learned_range` doubles the channels of the output.
        dropout: The dropout; None: what `model_config` says, and 0 for a network that is sized for the data.
        seed: The seed of the initial weights.

    Raises:
        UsageError: When the model config does not fit the data or the variance type.
    """
    out_channels = channels * (2 if variance_type == "learned_range" else 1)
    name = model_config
    if name is None:
        settings = sized_config(resolution, channels, out_channels, num_classes, dropout or 0.0)
    else:
        settings = _load_config(name)
        size = settings.get("sample_size")
        if isinstance(size, list | tuple) and size[0] == size[1]:
            settings["sample_size"] = size[0]
        _check_fit(settings, variance_type, channels, out_channels, resolution, num_classes)
        if dropout is not None:
            settings["dropout"] = dropout
    torch.manual_seed(seed)
    try:
        unet: UNet2DModel = UNet2DModel.from_config(settings)  # pyright: ignore[reportAssignmentType]
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"the model config {name!r} makes no UNet2DModel: {error}") from error
    torch.nn.init.zeros_(unet.conv_out.weight)
    if unet.conv_out.bias is not None:
        torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def compile_network(network: Any, unet: Any, device: torch.device) -> Any:
    """Compile a network for each shape of its input.

    Args:
        network: `unet`, its forward pass, or a module that wraps it.
        unet: The UNet2DModel. `use_plain_attention` changes how it attends.
        device: The device that it runs on.

    Returns:
        The compiled network, which is called as `network` is.
    """
    use_plain_attention(unet, device)
    # In bf16, diffusers' upsampling reads torch's version through a cache, about which torch prints a long warning.
    # Earlier versions of torch do not name the place.
    cached = r"Dynamo detected a call to a `functools\.lru_cache`-wrapped function(\.| at 'upsampling\.py:)"
    warnings.filterwarnings("ignore", cached, UserWarning)
    return torch.compile(network, dynamic=False)


def use_plain_attention(unet: Any, device: torch.device) -> None:
    """Make a network that is to be compiled attend by two products and a softmax, where that is faster.

    Compiled for a CPU, these take less time than the kernel of `scaled_dot_product_attention`. They hold a weight for
    each pair of pixels, so a network that attends on levels above MAX_ATTENTION_PIXELS keeps the kernel. So does every
    network on another device.
    """
    config = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else max(config.sample_size)
    blocks = zip(config.down_block_types, reversed(config.up_block_types), strict=True)
    attention_levels = [level for level, kinds in enumerate(blocks) if "Attn" in "".join(kinds)]
    if config.add_attention:
        attention_levels.append(len(config.down_block_types) - 1)
    if device.type != "cpu" or any(size >> level > MAX_ATTENTION_PIXELS for level in attention_levels):
        return
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def sized_config(
    resolution: int, channels: int, out_channels: int, num_classes: int | None = None, dropout: float = 0.0
) -> dict[str, Any]:
    """Return the config of a UNet2DModel that is sized for the data.

    The channels of its levels are, by resolution::

        8        64, 64
        16       64, 128
        28, 32   32, 64, 64
        64       64, 128, 128, 256
        128      64, 128, 128, 256, 256

    Args:
        resolution: The height and width of the images.
        channels: The channels of the images.
        out_channels: The channels of the output.
        num_classes: The number of classes that the network is conditioned on, if any.
        dropout: The dropout.

    Raises:
        UsageError: When the levels cannot halve `resolution`.
    """
    num_levels = 1 + max(1, math.ceil(math.log2(resolution / 8)))
    _check_halvings(resolution, num_levels)
    if resolution <= 8:
        widths = [64, 64]
    elif resolution <= 16:
        widths = [64, 128]
    elif resolution <= 32:
        widths = [32, 64, 64]
    else:
        widths = [64, 128, 128, *[256] * (num_levels - 3)]
    attends = [resolution >> level <= MAX_ATTENTION_PIXELS for level in range(num_levels)]
    return {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": out_channels,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": 2,
        "attention_head_dim": HEAD_CHANNELS,
        "norm_num_groups": widths[0] // MIN_GROUP_CHANNELS,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": dropout,
        "num_class_embeds": num_classes,
    }


def size_unit(num_levels: int) -> int:
    """Return 2^(L-1), of which the sides of images must be a multiple for a network of L levels."""
    return 2 ** (num_levels - 1)


def _check_halvings(resolution: int, num_levels: int) -> None:
    """Raise a UsageError that names the nearest resolutions if the levels cannot halve `resolution`."""
    unit = size_unit(num_levels)
    if resolution % unit:
        below = resolution // unit * unit
        above = below + unit
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UsageError(
            f"resolution must be a multiple of {unit}, got {resolution}: "
            f"the network halves it {num_levels - 1} times; the nearest is {nearest}"
        )


def _load_config(name: str) -> dict[str, Any]:
    """Read the config of a UNet2DModel from a JSON file, a recipe, a folder or the Hub."""
    path = Path(name)
    shipped = recipes.model_config(name)
    if path.is_file() or (shipped is not None and not path.exists()):
        file = path if path.is_file() else shipped
        assert file is not None
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"model_config_name_or_path {name!r} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise UsageError(
                f"model_config_name_or_path {name!r} must hold a JSON object, got {type(settings).__name__}"
            )
        return settings
    subfolder = "unet" if (path / "unet" / "config.json").is_file() else None
    try:
        loaded: Any = UNet2DModel.load_config(name, subfolder=subfolder)
        return dict(loaded)
    except OSError as error:
        raise UsageError(
            f"model_config_name_or_path must be a JSON file, a folder with config.json, a recipe that ships one or a "
            f"Hub model, got {name!r}, which is none that can be reached"
        ) from error


def _check_fit(
    settings: dict[str, Any],
    variance_type: str,
    channels: int,
    out_channels: int,
    resolution: int,
    num_classes: int | None,
) -> None:
    """Raise a UsageError if a model config does not fit the data or the variance type."""
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    unknown = [name for name in settings if name not in parameters and not name.startswith("_")]
    if unknown:
        raise UsageError(f"the model config has settings that UNet2DModel does not know: {', '.join(unknown)}")
    if settings.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UsageError(f"the model config must be of a UNet2DModel, got {settings['_class_name']}")
    for name, needed, reason in (
        ("in_channels", channels, "the channels of the data; change it or give --channels"),
        ("out_channels", out_channels, f"for variance_type {variance_type}"),
        ("sample_size", resolution, "the resolution; change it or give --resolution"),
        ("num_class_embeds", num_classes, "the classes of label_column"),
    ):
        got = settings.get(name, parameters[name].default)
        if got != needed:
            raise UsageError(f"the model config's {name} must be {needed}, {reason}; got {got}")
    widths = settings.get("block_out_channels", parameters["block_out_channels"].default)
    _check_halvings(resolution, len(widths))


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are numbers.

    Args:
        tensors: Name -> tensor, of any shape and type.
        source: Where they are from, as the message names it.

    Raises:
        UsageError: When one holds NaN or infinity.
    """
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise UsageError(
            f"{source} must have finite weights, got NaN or infinity in {len(bad)} of {len(tensors)} tensors, first "
            f"in {bad[0]!r}: take an earlier checkpoint, or another model"
        )
