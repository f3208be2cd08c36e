"""The config of a network: sized for the data, or read from a file or the Hub, and checked to fit them.

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
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from hf_ddpm import recipes
from hf_ddpm.image_size import Size, format_size, to_resolution, to_size
from hf_ddpm.labels import Columns, Values
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import look_at, network_folder, parse_mapping
from hf_ddpm.runtime.settings import require_choice, shortened

HEAD_CHANNELS = 64
MAX_ATTENTION_PIXELS = 16
MIN_GROUP_CHANNELS = 4
TIME_EMBEDDINGS = ("positional", "fourier", "learned")
# What a wrong value in a config or a file that is cut off makes Python, torch and diffusers raise.
LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, NameError)


@contextmanager
def naming_config(source: str) -> Iterator[None]:
    """Raise what a wrong config causes within a `with` block as a UsageError that names where it comes from."""
    try:
        yield
    except (*LOADING_ERRORS, RuntimeError, ArithmeticError) as error:
        reason = in_one_line(error, with_type=True)[:400]
        raise UsageError(f"{source} must make a UNet2DModel that an image can pass, got {reason}") from error


def num_classes_of(config: Mapping[str, Any]) -> int | None:
    """Return how many classes a network takes: a UNet2DModel's, or a DiT's; None if it takes none, or does not say."""
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")


def sized_config(
    size: Size, channels: int, out_channels: int, num_classes: int | None = None, dropout: float = 0.0
) -> dict[str, Any]:
    """Return the config of a UNet2DModel that is sized for the data.

    The network of an oblong image is that of a square with its shorter side, but that no level attends to more than
    MAX_ATTENTION_PIXELS**2 pixels. The channels of the levels are, by this side::

        8        32, 48
        16       64, 128
        28, 32   32, 64, 64
        64       64, 128, 128, 256
        128      64, 128, 128, 256, 256

    Each level has two layers. Up to a side of 8 there is one, and the first level does not attend: a larger
    network takes longer, for images that are no better.

    Args:
        size: The height and width of the images.
        channels: The channels of the images.
        out_channels: The channels of the output.
        num_classes: The number of classes that the network is conditioned on, if any.
        dropout: The dropout.

    Raises:
        UsageError: When the levels cannot halve `size`.
    """
    side = min(size)
    num_levels = 1 + max(1, math.ceil(math.log2(side / 8)))
    _check_halvings(size, num_levels)
    is_tiny = side <= 8
    if is_tiny:
        widths = [32, 48]
    elif side <= 16:
        widths = [64, 128]
    elif side <= 32:
        widths = [32, 64, 64]
    else:
        widths = [64, 128, 128, *[256] * (num_levels - 3)]
    num_pixels = [(size[0] >> level) * (size[1] >> level) for level in range(num_levels)]
    attends = [number <= MAX_ATTENTION_PIXELS**2 for number in num_pixels]
    if is_tiny:
        attends[0] = False
    return {
        "sample_size": to_resolution(size),
        "in_channels": channels,
        "out_channels": out_channels,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": 1 if is_tiny else 2,
        "attention_head_dim": min(HEAD_CHANNELS, widths[-1]),
        "norm_num_groups": widths[0] // MIN_GROUP_CHANNELS,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": dropout,
        "num_class_embeds": num_classes,
    }


def size_unit(num_levels: int) -> int:
    """Return 2^(L-1), of which the sides of images must be a multiple for a network of L levels."""
    return 2 ** (num_levels - 1)


def require_size(unet: Any, size: Size) -> None:
    """Check that a network that was trained with images of another size takes images of this one.

    Raises:
        UsageError: When it does not.
    """
    config = unet.config
    if not isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):
        raise UsageError(
            f"height and width must be those of the model, {format_size(to_size(config.sample_size))}, got "
            f"{format_size(size)}: of a {config['_class_name']} nobody knows which others it takes"
        )
    _check_halvings(size, len(config.block_out_channels), "height and width")


def _check_halvings(size: Size, num_levels: int, name: str = "resolution") -> None:
    """Raise a UsageError that names the nearest sizes if the levels cannot halve `size`."""
    unit, (height, width) = size_unit(num_levels), size
    if height % unit == 0 == width % unit:
        return
    if name == "resolution" and height == width:
        raise UsageError(
            f"resolution must be a multiple of {unit}, got {height}: "
            f"the network halves it {num_levels - 1} times; the nearest is {_nearest(height, unit)}"
        )
    must = f"{name} must be multiples" if name != "resolution" else "height and width of resolution must be multiples"
    raise UsageError(
        f"{must} of {unit}, got {format_size(size)}: the network halves them {num_levels - 1} times; the nearest are "
        f"a height of {_nearest(height, unit)} and a width of {_nearest(width, unit)}"
    )


def _nearest(side: int, unit: int) -> str:
    """Return in words the multiples of `unit` that are nearest to a side."""
    below = side // unit * unit
    nearest = (below,) if below == side else (below, below + unit)
    return " or ".join(str(each) for each in nearest if each)


def outputs_per_channel(variance_type: str) -> int:
    """Return how many channels the network gives for each channel of an image."""
    return 2 if variance_type == "learned_range" else 1


def load_config(name: str, source: str) -> dict[str, Any]:
    """Read the config of a UNet2DModel from a JSON file, a recipe, a folder or the Hub."""
    path = look_at("model_config_name_or_path", name)
    shipped = recipes.model_config(name)
    files = [network_folder(path) / "config.json", path / "config.json"] if path.is_dir() else [path, shipped]
    file = next((file for file in files if file is not None and file.is_file()), None)
    if file is not None:
        settings = parse_mapping(file.read_bytes(), file, "a model config is a JSON object", is_json=True)
    elif path.exists() or Path(name).suffix == ".json":
        raise UsageError(f"model_config_name_or_path must be a JSON file or a folder with config.json, got {name!r}")
    else:
        try:
            settings = dict(_of_the_hub(name))
        except (OSError, ValueError) as error:
            raise UsageError(
                "model_config_name_or_path must be a JSON file, a folder with config.json, a recipe that ships one or "
                f"a Hub model, got {name!r}, which is none that can be reached"
            ) from error
    size = to_size(settings.get("sample_size", 0), f"sample_size of {source}")
    return {**settings, "sample_size": to_resolution(size)}


def _of_the_hub(name: str) -> Any:
    try:
        return UNet2DModel.load_config(name, subfolder="unet")
    except OSError:
        return UNet2DModel.load_config(name)


def check_fit(
    settings: dict[str, Any],
    variance_type: str,
    channels: int | None,
    size: Size | None,
    source: str,
    condition_channels: int | None = 0,
) -> None:
    """Raise a UsageError if a model config does not fit the data, as far as they are known, or the variance type."""
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    unknown = [name for name in settings if name not in parameters and not name.startswith("_")]
    if unknown:
        raise UsageError(f"{source} has settings that UNet2DModel does not know: {', '.join(unknown)}")
    if settings.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UsageError(f"{source} must be of a UNet2DModel, got {settings['_class_name']}")
    require_choice(
        f"time_embedding_type of {source}", settings.get("time_embedding_type", "positional"), TIME_EMBEDDINGS
    )
    if channels is not None and condition_channels is not None:
        reason = "the channels of the data; change it or give --channels"
        if condition_channels:
            reason = f"the {channels} of the images and the {condition_channels} of their conditions; change it"
        require_setting(settings, "in_channels", channels + condition_channels, reason, source)
    if size is not None:
        reason = "the resolution; change it or give --resolution"
        require_setting(settings, "sample_size", to_resolution(size), reason, source)
    needed = settings.get("in_channels", parameters["in_channels"].default)
    if isinstance(needed, int):
        needed = (needed - (condition_channels or 0)) * outputs_per_channel(variance_type)
    if condition_channels is not None:
        require_setting(settings, "out_channels", needed, f"for variance_type {variance_type}", source)
    widths = settings.get("block_out_channels", parameters["block_out_channels"].default)
    if not isinstance(widths, list | tuple) or not widths:
        raise UsageError(f"block_out_channels of {source} must be a list of whole numbers, got {shortened(widths)}")
    _check_halvings(to_size(settings["sample_size"]), len(widths))


def require_place_for(labels: Values | Columns, settings: dict[str, Any], source: str) -> None:
    """Raise a UsageError if a model config has a place for other labels than numbers or several columns."""
    kind, count = ("timestep", 1) if isinstance(labels, Values) else ("identity", None)
    if settings.get("class_embed_type") is not None or settings.get("num_class_embeds") is not None:
        require_setting(settings, "class_embed_type", kind, "for the labels of label_column", source)
        require_setting(settings, "num_class_embeds", count, "for the labels of label_column", source)
    if isinstance(labels, Values):
        reason = "as a number is embedded as a timestep is, also between and below these"
        require_setting(settings, "time_embedding_type", "positional", reason, source)


def require_setting(settings: dict[str, Any], name: str, needed: Any, reason: str, source: str) -> None:
    """Check that a setting of a config has the value that is needed, where diffusers' default counts as given."""
    got = settings.get(name, inspect.signature(UNet2DModel.__init__).parameters[name].default)
    if got != needed:
        raise UsageError(f"{name} of {source} must be {needed}, {reason}; got {shortened(got)}")
