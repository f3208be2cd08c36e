"""The feature networks, which turn an image into a vector; sets of images are compared by their vectors.

image       (B, C, H, W) uint8 with C 1 or 3; gray images are repeated to 3 channels
input       the image, resized to the network's input size, then (x / unit - mean) / std. `dinov2` and
            `efficientnet-lite0` resize in float32 (bicubic with antialiasing, neither rounded nor clipped afterwards),
            `clip` as its published code does, see `resize_as_pillow`. Inception's file does both itself, in its way.
            All but `clip` take squares of oblong images by stretching them, as is usual for the FID: samples and real
            images alike. `clip` keeps the ratio, and sees the square in the middle alone.
feature     the network's vector for each image, (B, d) float32
identity    everything that determines a feature's value; only distances between features of one identity compare
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.evaluation.feature_weights import AS_PILLOW, EFFICIENTNET_PACKAGES, NETWORKS, Published, check_network
from hf_ddpm.runtime.devices import require_device
from hf_ddpm.runtime.errors import UsageError


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A loaded network, which turns images into features.

    Args:
        name: The key in `NETWORKS`.
        dimensions: d, the length of a feature.
        identity: Values that JSON can hold. Those under the key `information` do not change features; all others do.
        compute: The function from (B, 3, H, W) uint8 on `device` to (B, d).
    """

    name: str
    dimensions: int
    identity: dict[str, Any]
    device: torch.device
    compute: Callable[[Tensor], Tensor]

    @property
    def frechet_name(self) -> str:
        """The name of the Fréchet distance between its features; only that of `inception` is "FID"."""
        return NETWORKS[self.name].frechet_name

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images; how images are divided into batches changes only the rounding.

        Args:
            images: (B, C, H, W) uint8 with C 1 or 3, on any device.

        Returns:
            The features, (B, d) float32 on the CPU.

        Raises:
            UsageError: When the images have another type or shape, or a feature is not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise UsageError(f"images must be (B, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
        if images.shape[1] not in (1, 3):
            remedy = " composite them over white, a reference's by --channels 3" if images.shape[1] == 4 else ""
            raise UsageError(f"images must have 1 or 3 channels, as networks do, got {images.shape[1]}:{remedy}")
        # On a CPU, passes of 16 images are twice as fast as passes of 64, which do not fit into its caches.
        size, count = (16 if self.device.type == "cpu" else 64), len(images)
        if self.device.type == "cpu":
            # A pass of fewer images is rounded by the number of threads, which differs between one process and
            # several: the last one is filled up.
            images = images[torch.arange(-(-count // size) * size).clamp(max=count - 1)]
        # By default, a GPU's convolutions round to 10 bits, and their results differ from run to run.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            passes = (part.to(self.device).expand(-1, 3, -1, -1) for part in images.split(size))
            features = torch.cat([self.compute(part).to("cpu", torch.float32) for part in passes])[:count]
        bad = len(features) - int(features.isfinite().all(dim=1).sum())
        if bad:
            raise UsageError(
                f"features must be finite, got NaN or infinity for {bad} of {len(features)} images from {self.name}: "
                "its weights are damaged, or the device is not fit for it; try --device cpu"
            )
        return features


def network_at_hand(device: str | torch.device | None = None) -> FeatureNetwork | None:
    """Return `efficientnet-lite0`, which needs no download, or None where its packages are not installed.

    Args:
        device: See `load_network`.
    """
    is_installed = all(map(find_spec, EFFICIENTNET_PACKAGES))
    return load_network("efficientnet-lite0", device=device) if is_installed else None


def load_network(
    name: str, path: str | Path | None = None, device: str | torch.device | None = None
) -> FeatureNetwork:
    """Load a network onto a device.

    Args:
        name: A key of `NETWORKS`.
        path: The weights, as `check_network` takes them.
        device: Default: the CPU.

    Raises:
        UsageError: When `check_network` raises it, the weights are incomplete, or there is no such device.
    """
    weights = check_network(name, path)
    torch_device = require_device(device or "cpu")
    published = NETWORKS[name]
    size = published.input_size
    details = {}
    if name == "inception":
        net, values = _load_torchscript(weights), "in the network's file, from 0 to 255"
    else:
        x = "x" if published.unit == 1 else f"x / {published.unit:g}"
        values = f"({x} - mean) / std, mean {published.mean}, std {published.std}, x from 0 to 255"
        net, details = (
            _load_efficientnet(weights) if name == "efficientnet-lite0" else _load_transformer(name, weights)
        )
        size = details.pop("image_size", size)
    net = net.to(torch_device).eval()

    def compute(images: Tensor) -> Tensor:
        if name == "inception":
            return net(images, return_features=True)
        x = to_input(images, published, size)
        if name == "efficientnet-lite0":
            return net.extract_features(x).mean(dim=(2, 3))
        output = net(pixel_values=x)
        return F.normalize(output.image_embeds, dim=-1) if name == "clip" else output.pooler_output

    black_image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    dimensions = FeatureNetwork(name, 0, {}, torch_device, compute)(black_image).shape[1]
    identity = {
        "network": name,
        "weights_sha256": details.pop("weights_sha256", published.sha256),
        "features": published.features,
        "dimensions": dimensions,
        "input_size": size,
        "resize": published.resize,
        "values": values,
        **details,
        "information": {
            # Only the last component of a local path: the rest says where the weights are, not what they are.
            "source": published.source if path is None else Path(path).name if Path(path).exists() else str(path),
            "published_size": published.published_size,
            "device": torch_device.type,
            "torch": torch.__version__,
            **({"pillow": version("pillow")} if published.resize == AS_PILLOW else {}),
            **({"transformers": version("transformers")} if name in ("dinov2", "clip") else {}),
        },
    }
    return FeatureNetwork(name, dimensions, identity, torch_device, compute)


def to_input(images: Tensor, published: Published, size: int) -> Tensor:
    """Return the network's input, (B, 3, size, size) float32, for images, (B, 3, H, W) uint8.

    Oblong images are stretched to a square; AS_PILLOW takes the square in their middle instead.
    """
    if published.resize == AS_PILLOW:
        x = resize_as_pillow(images, size).to(images.device, torch.float32)
    else:
        x = F.interpolate(images.to(torch.float32), size=(size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (published.mean, published.std))
    return (x / published.unit - mean) / std


def resize_as_pillow(images: Tensor, size: int) -> Tensor:
    """Resize the square in the middle of each image by Pillow, which rounds to 8 bits and clips to [0, 255].

    So does the code of CMMD (google-research, cmmd/io_util.py, `_center_crop_and_resize`). Its later resizing, in
    cmmd/embedding.py, is then one to the same size. For square images transformers' CLIPImageProcessor and OpenAI's
    clip.py do the same. Bicubic interpolation in float32 overshoots, from -47 to 297 for black and white pixels.

    Args:
        images: (B, 3, H, W) uint8.
        size: Pixels.

    Returns:
        The images, (B, 3, size, size) uint8 on the CPU.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    squares = images[:, :, top : top + side, left : left + side].permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in squares]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def _load_torchscript(path: Path) -> Any:
    with warnings.catch_warnings():
        # The published network is TorchScript. torch still reads it, but warns against writing it.
        warnings.filterwarnings("ignore", r"`torch\.jit\.load`", DeprecationWarning)
        return torch.jit.load(str(path), map_location="cpu")


def _load_efficientnet(path: Path) -> tuple[Any, dict[str, Any]]:
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # This memory format is twice as fast on a CPU.
    return net.to(memory_format=torch.channels_last), {}  # pyright: ignore[reportCallIssue]


def _load_transformer(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    model_types = {"dinov2": ("dinov2",), "clip": ("clip", "clip_vision_model")}[name]
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type not in model_types:
        raise UsageError(
            f"network_path must hold a model of the type {model_types[0]!r} for {name}, got {model_type!r}"
        )
    cls: Any = transformers.Dinov2Model if name == "dinov2" else transformers.CLIPVisionModelWithProjection
    verbosity = transformers.logging.get_verbosity()
    # Otherwise transformers lists each weight of CLIP's text model, which is not needed.
    transformers.logging.set_verbosity_error()
    try:
        net, report = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"network_path must hold whole weights of {name}, got {str(folder)!r}: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random values
        raise UsageError(f"network_path must hold all weights of {name}, got {str(folder)!r} without {missing[:3]}")
    names = ("num_hidden_layers", "num_attention_heads", "patch_size", "hidden_act", "layer_norm_eps")
    architecture = {key: getattr(net.config, key) for key in names}
    details = {"weights_sha256": _sha256_of_parameters(net.float()), "architecture": architecture}
    # DINOv2 takes images of any size; CLIP takes one size.
    return net, details | ({"image_size": net.config.image_size} if name == "clip" else {})


def _sha256_of_parameters(net: torch.nn.Module) -> str:
    """Return a checksum that is the same for equal weights, however files divide and name them."""
    digests = sorted(hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for p in net.parameters())
    return hashlib.sha256("".join(digests).encode()).hexdigest()
