"""The network: a `UNet2DModel`, made or loaded, tried, compiled, and given labels in any type."""

from __future__ import annotations

import json
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

from hf_ddpm.classes import Classes, check_embeddings
from hf_ddpm.image_size import Size, to_size
from hf_ddpm.label_embedding import attach_embedding, attach_embedding_beside, example_labels
from hf_ddpm.labels import LABELS_FILE, Columns, Labels, Values, describe_labels
from hf_ddpm.network_config import (
    LOADING_ERRORS,
    MAX_ATTENTION_PIXELS,
    check_fit,
    load_config,
    naming_config,
    num_classes_of,
    outputs_per_channel,
    require_place_for,
    require_setting,
    sized_config,
)
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.settings import shortened


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
        out_channels = channels * outputs_per_channel(variance_type)
        settings = sized_config(size, channels + condition_channels, out_channels, num_classes, dropout or 0.0)
    else:
        settings = load_config(model_config, source)
        check_fit(settings, variance_type, channels, size, source, 0 if widens else condition_channels)
        if widens:
            settings["in_channels"] = channels + condition_channels
        if labels is not None:
            require_place_for(labels, settings, source)
        elif num_classes is None or settings.get("num_class_embeds") is not None:
            reason = "for the classes of label_column, with one more unless class_dropout is 0"
            reason = "as no label_column is given" if num_classes is None else reason
            require_setting(settings, "num_class_embeds", num_classes, reason, source)
        if labels is None:
            require_setting(settings, "class_embed_type", None, "as the labels are classes, or there are none", source)
        settings["num_class_embeds"] = num_classes
        if dropout is not None:
            settings["dropout"] = dropout
    if isinstance(labels, Values):
        settings |= {"class_embed_type": "timestep", "num_class_embeds": 1}
    if isinstance(labels, Columns):
        settings |= {"class_embed_type": "identity", "num_class_embeds": None}
    torch.manual_seed(seed)
    with naming_config(source):
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
        settings = sized_config(size, in_channels, count * outputs_per_channel(variance_type))
    else:
        settings = load_config(model_config, source)
        check_fit(settings, variance_type, channels, size, source, 0 if widens else condition_channels)
        if widens:
            count = settings.get("in_channels", 3)
            settings["in_channels"] = count + (count if condition_channels is None else condition_channels)
    with naming_config(source):
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
    except (*LOADING_ERRORS, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise UsageError(
            f"{source} must hold a whole model, got {in_one_line(error, with_type=True)[:400]}: save or download it "
            "again, or take another"
        ) from error


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
