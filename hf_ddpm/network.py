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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import TimestepEmbedding
from safetensors import SafetensorError
from torch import Tensor

from hf_ddpm import recipes
from hf_ddpm.classes import Classes, check_embeddings
from hf_ddpm.image_size import Size, format_size, to_resolution, to_size
from hf_ddpm.label_embedding import attach_embedding, attach_embedding_beside, example_labels
from hf_ddpm.labels import LABELS_FILE, Columns, Labels, Values, describe_labels
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import look_at, network_folder, parse_mapping
from hf_ddpm.runtime.settings import require_choice, shortened

HEAD_CHANNELS = 64
MAX_ATTENTION_PIXELS = 16
MIN_GROUP_CHANNELS = 4
TIME_EMBEDDINGS = ("positional", "fourier", "learned")
# What a wrong value in a config or a file that is cut off makes Python, torch and diffusers raise.
_LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, NameError)


def make_unet(
    channels: int,
    size: Size,
    num_classes: int | None = None,
    *,
    model_config: str | None = None,
    variance_type: str = "fixed_small",
    dropout: float | None = None,
    seed: int = 0,
    source: str = "the model config",
    condition_channels: int = 0,
    widens: bool = False,
    labels: Values | Columns | None = None,
) -> UNet2DModel:
    """Make a new network for images of `channels` x `size`.

    The last convolution starts at zero, while diffusers leaves it random. The first prediction is then 0, and the
    first loss is the power of the target.

    Args:
        channels: The channels of the images.
        size: The height and width of the images.
        num_classes: The number of embeddings of classes, see `Classes`; None: it is unconditional.
        model_config: The config of a UNet2DModel: a JSON file, a folder, the name of a recipe or a Hub id; None: the
            network is sized for the data.
        variance_type: The scheduler's variance type; `learned_range` doubles the channels of the output.
        dropout: The dropout; None: what `model_config` says, and 0 for a network that is sized for the data.
        seed: The seed of the initial weights.
        source: What error messages call `model_config`.
        condition_channels: The channels that the network takes after those of the images.
        widens: Whether `model_config` is of a network without conditions, which gets their channels.
        labels: What it is conditioned on beside classes: numbers, or several columns; given without `num_classes`.

    Raises:
        UsageError: When the model config does not fit the data or the variance type.
    """
    if model_config is None:
        out_channels = channels * _outputs_per_channel(variance_type)
        settings = sized_config(size, channels + condition_channels, out_channels, num_classes, dropout or 0.0)
    else:
        settings = _load_config(model_config, source)
        _check_fit(settings, variance_type, channels, size, source, 0 if widens else condition_channels)
        if widens:
            settings["in_channels"] = channels + condition_channels
        if labels is not None:
            _require_place_for(labels, settings, source)
        elif num_classes is None or settings.get("num_class_embeds") is not None:
            reason = "for the classes of label_column, with one more unless class_dropout is 0"
            reason = "as no label_column is given" if num_classes is None else reason
            _require(settings, "num_class_embeds", num_classes, reason, source)
        if labels is None:
            _require(settings, "class_embed_type", None, "as the labels are classes, or there are none", source)
        settings["num_class_embeds"] = num_classes
        if dropout is not None:
            settings["dropout"] = dropout
    if isinstance(labels, Values):
        settings |= {"class_embed_type": "timestep", "num_class_embeds": 1}
    if isinstance(labels, Columns):
        settings |= {"class_embed_type": "identity", "num_class_embeds": None}
    torch.manual_seed(seed)
    with _naming_config(source):
        unet: UNet2DModel = UNet2DModel.from_config(settings)  # pyright: ignore[reportAssignmentType]
        if isinstance(labels, Columns):
            attach_embedding(unet, labels)
    torch.nn.init.zeros_(unet.conv_out.weight)
    if unet.conv_out.bias is not None:
        torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


@dataclass(frozen=True)
class Trial:
    """The size of a network, as a pass of one image through it without numbers tells it.

    Args:
        num_parameters: The number of its parameters.
        largest_output: The number of values that its largest layer gives for an image.
        channels: The channels of its images.
        size: Their height and width.
    """

    num_parameters: int
    largest_output: int
    channels: int
    size: Size


def try_network(
    channels: int | None = None,
    size: Size | None = None,
    *,
    model_config: str | None = None,
    variance_type: str = "fixed_small",
    source: str = "the model config",
    condition_channels: int | None = 0,
    widens: bool = False,
) -> Trial:
    """Pass an image through a network that has shapes and no numbers, which takes no memory and little time.

    Args:
        channels: The channels of the images; None: those of `model_config`, or 3.
        size: The height and width of the images; None: those of `model_config`.
        model_config: As of `make_unet`.
        variance_type: As of `make_unet`.
        source: As of `make_unet`.
        condition_channels: As of `make_unet`; None: there are some, whose number is not known.
        widens: As of `make_unet`.

    Raises:
        UsageError: When there is no such network, or an image cannot pass.
    """
    if model_config is None:
        assert size is not None
        count = channels or 3
        in_channels = count + (count if condition_channels is None else condition_channels)
        settings = sized_config(size, in_channels, count * _outputs_per_channel(variance_type))
    else:
        settings = _load_config(model_config, source)
        _check_fit(settings, variance_type, channels, size, source, 0 if widens else condition_channels)
        if widens:
            count = settings.get("in_channels", 3)
            settings["in_channels"] = count + (count if condition_channels is None else condition_channels)
    with _naming_config(source):
        return _try_settings(json.dumps(settings, sort_keys=True))


@cache
def _try_settings(settings: str) -> Trial:
    """Pass an image through the network of a config, as JSON. Runs in one process often have the same network."""
    largest = 0

    def note(_: Any, __: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.numel() if isinstance(output, Tensor) else 0)

    with torch.device("meta"), torch.no_grad():
        unet: Any = UNet2DModel.from_config(json.loads(settings))
        for module in unet.modules():
            module.register_forward_hook(note)
        config = unet.config
        size = to_size(config.sample_size)
        x_t = torch.zeros(1, config.in_channels, *size)
        unet(x_t, torch.zeros(1, dtype=torch.int64), **example_labels(unet))
    return Trial(sum(p.numel() for p in unet.parameters()), largest, config.in_channels, size)


def load_unet(folder: Path, source: str) -> UNet2DModel:
    """Load a network whose weights are whole and finite.

    Args:
        folder: A folder with config.json and weights.
        source: What error messages call it.

    Raises:
        UsageError: When they are not.
    """
    with naming_weights(source):
        unet: Any = UNet2DModel.from_pretrained(folder)
        attach_embedding_beside(unet, folder)
    require_finite(unet.state_dict(), source)
    return unet


@contextmanager
def naming_weights(source: str) -> Iterator[None]:
    """Turn what diffusers raises for damaged files of a model in a `with` block into a UsageError.

    Args:
        source: What the message calls the model.
    """
    try:
        yield
    except UsageError:
        raise
    except (*_LOADING_ERRORS, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise UsageError(
            f"{source} must hold a whole model, got {in_one_line(error, with_type=True)[:400]}: save or download it "
            "again, or take another"
        ) from error


@contextmanager
def _naming_config(source: str) -> Iterator[None]:
    try:
        yield
    except (*_LOADING_ERRORS, RuntimeError, ArithmeticError) as error:
        reason = in_one_line(error, with_type=True)[:400]
        raise UsageError(f"{source} must make a UNet2DModel that an image can pass, got {reason}") from error


def num_classes_of(config: Mapping[str, Any]) -> int | None:
    """Return how many classes a network takes: a UNet2DModel's, or a DiT's; None if it takes none, or does not say."""
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")


def require_labels_of(labels: Labels, unet: Any) -> None:
    """Check that a network takes labels.

    Raises:
        UsageError: When it takes others, so that they are those of another model.
    """
    if isinstance(labels, Classes):
        check_embeddings(labels, num_classes_of(unet.config))
        return
    kind = "identity" if isinstance(labels, Columns) else "timestep"
    if unet.config.get("class_embed_type") != kind:
        raise UsageError(
            f"{LABELS_FILE} must be of the model's network, got {describe_labels(labels)} for a network with "
            f"class_embed_type {unet.config.get('class_embed_type')}: remove it, or save the model again"
        )


def accept_labels_in_any_type(unet: Any) -> None:
    """Let a network that embeds a number as its timestep do so in half precision, too: diffusers gives it float32."""
    embedding = getattr(unet, "class_embedding", None)
    if isinstance(embedding, TimestepEmbedding) and not embedding._forward_pre_hooks:
        embedding.register_forward_pre_hook(_in_own_type)


def _in_own_type(embedding: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return arguments[0].to(embedding.linear_1.weight.dtype), *arguments[1:]


def timestep_for(network: Any, t: Tensor, x_t: Tensor) -> Tensor:
    """Return t as a network takes it: a UNet2DModel one for all images, as stock gives it, others one for each."""
    return t if isinstance(network, UNet2DModel) else t.expand(len(x_t)).to(x_t.device)


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
    if not isinstance(unet, UNet2DModel):
        return
    config: Any = unet.config
    height, width = to_size(config.sample_size)
    blocks = zip(config.down_block_types, reversed(config.up_block_types), strict=True)
    attention_levels = [level for level, kinds in enumerate(blocks) if "Attn" in "".join(kinds)]
    if config.add_attention:
        attention_levels.append(len(config.down_block_types) - 1)
    if device.type != "cpu" or any(
        (height >> level) * (width >> level) > MAX_ATTENTION_PIXELS**2 for level in attention_levels
    ):
        return
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


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


def _outputs_per_channel(variance_type: str) -> int:
    return 2 if variance_type == "learned_range" else 1


def _load_config(name: str, source: str) -> dict[str, Any]:
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


def _check_fit(
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
        _require(settings, "in_channels", channels + condition_channels, reason, source)
    if size is not None:
        _require(
            settings, "sample_size", to_resolution(size), "the resolution; change it or give --resolution", source
        )
    needed = settings.get("in_channels", parameters["in_channels"].default)
    if isinstance(needed, int):
        needed = (needed - (condition_channels or 0)) * _outputs_per_channel(variance_type)
    if condition_channels is not None:
        _require(settings, "out_channels", needed, f"for variance_type {variance_type}", source)
    widths = settings.get("block_out_channels", parameters["block_out_channels"].default)
    if not isinstance(widths, list | tuple) or not widths:
        raise UsageError(f"block_out_channels of {source} must be a list of whole numbers, got {shortened(widths)}")
    _check_halvings(to_size(settings["sample_size"]), len(widths))


def _require_place_for(labels: Values | Columns, settings: dict[str, Any], source: str) -> None:
    """Raise a UsageError if a model config has a place for other labels than numbers or several columns."""
    kind, count = ("timestep", 1) if isinstance(labels, Values) else ("identity", None)
    if settings.get("class_embed_type") is not None or settings.get("num_class_embeds") is not None:
        _require(settings, "class_embed_type", kind, "for the labels of label_column", source)
        _require(settings, "num_class_embeds", count, "for the labels of label_column", source)
    if isinstance(labels, Values):
        reason = "as a number is embedded as a timestep is, also between and below these"
        _require(settings, "time_embedding_type", "positional", reason, source)


def _require(settings: dict[str, Any], name: str, needed: Any, reason: str, source: str) -> None:
    got = settings.get(name, inspect.signature(UNet2DModel.__init__).parameters[name].default)
    if got != needed:
        raise UsageError(f"{name} of {source} must be {needed}, {reason}; got {shortened(got)}")


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are there, and finite numbers.

    Args:
        tensors: Name -> tensor, of any shape and type.
        source: Where they are from, as the message names it.

    Raises:
        UsageError: When one is missing, or holds NaN or infinity.
    """
    missing = [name for name, tensor in tensors.items() if tensor.is_meta]
    if missing:  # diffusers leaves them without numbers
        raise UsageError(
            f"{source} must hold a whole model, got none of the weights {shortened(missing[:3])} of {len(tensors)}: "
            "save or download it again, or take another"
        )
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise UsageError(
            f"{source} must have finite weights, got NaN or infinity in {len(bad)} of {len(tensors)} tensors, first "
            f"in {bad[0]!r}: take an earlier checkpoint, or another model"
        )
