"""Models and runs that are pushed to the Hub of hub_server, and what the tests know of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import _http

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.hub.card import write_card
from hf_ddpm.runtime.files import sha256
from tests.support.networks import smallest_unet_config

TOKEN, OTHER, READER = "hf_alicesecret", "hf_bobsecret", "hf_readersecret"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "/commit/main$"
NAME = "alice/digits"
# huggingface_hub uploads with an argument of httpx that is deprecated.
UPLOAD_WARNING = "ignore:Use 'content=:DeprecationWarning"


ARRIVES = {
    *("README.md", "config.yaml", "run.json", "metrics.jsonl", "figures/samples.png", "figures/reverse.gif"),
    *("model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json", ".gitattributes"),
}


def forget_connections() -> None:
    """Close the client's connections: a test may have pointed it at another Hub."""
    (getattr(_http, "close_session", None) or _http.reset_sessions)()  # the latter before version 1


def save_model(folder: Path, seed: int = 0, scheduler: Any = None, **saved: Any) -> Path:
    """Save a small random model: ours, or stock diffusers' with a scheduler that is given."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(**smallest_unet_config(channels=1))
    if scheduler is None:
        scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        DDPMPipeline(unet, scheduler).save_pretrained(folder, **saved)
    else:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder, **saved)
    return folder


def save_run(folder: Path) -> Path:
    """Write a folder as training leaves it, with files that must not be published beside those that must."""
    save_model(folder)
    places = {"output_dir": str(folder), "train_data_dir": "/data/pictures", "cache_dir": "~/cache", "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(places))
    training = {"steps": 1200, "images": 76800}
    (folder / "run.json").write_text(json.dumps({"data": {"name": "/data/pictures"}, "training": training}))
    (folder / "metrics.jsonl").write_text('{"step": 1200, "images": 76800, "loss": 0.5}\n')
    hidden = ["optimizer.bin", "random_states_0.pkl", "unet/old.pt", ".env", "notes.txt", ".lock", "logs/events.1"]
    hidden += ["checkpoint-3/unet/diffusion_pytorch_model.safetensors", "checkpoint-3/optimizer.bin"]
    hidden += ["previews/step-0000003.png", "ema/snapshot-1.safetensors", "figures/raw.npy", "best/best.json"]
    for name in ("figures/samples.png", "figures/reverse.gif", *hidden):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(TOKEN.encode())
    (folder / "figures/samples.png").write_bytes(b"png")
    (folder / "figures/reverse.gif").write_bytes(b"gif")
    write_card(folder)
    return folder


def evaluate_with_pictures(run: Path) -> set[str]:
    """Write what `hf-ddpm evaluate` leaves in a run, and return the names of the files."""
    (run / "evaluation.json").write_text(json.dumps({"weights_sha256": sha256(run / WEIGHTS), "results": []}))
    names = {f"figures/{name}.png" for name in ("steps", "seconds", "bound", "memorization")}
    for name in names:
        (run / name).write_bytes(b"of training images")
    return names | {"evaluation.json"}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_on_hub(name: str, text: str, path: str = "README.md") -> None:
    """Write a file on the Hub, as somebody else may do."""
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=name)


def sample_images(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images


def nowhere() -> str:
    """Return an address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
