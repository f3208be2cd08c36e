"""Checkpoints on the Hub of hub_server: runs that have them, and what the place of one holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm.runtime.files import sha256
from hf_ddpm.training.checkpoint import FORMAT
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import settings_to_save
from tests.support.hub_buckets import BucketServer
from tests.support.hub_runs import NAME
from tests.support.hub_server import HubServer

PLACE = f"{NAME}-checkpoint"


def is_private(hub: HubServer) -> bool:
    return hub.buckets[PLACE].private if isinstance(hub, BucketServer) else hub.repo(PLACE).private


def stored(hub: HubServer) -> dict[str, bytes]:
    """Return the files in the place of the checkpoint."""
    if isinstance(hub, BucketServer):
        hashes = dict(hub.buckets[PLACE].hashes)  # a batch of a client that was killed may still be on its way
        return {path: hub.xet_content(content) for path, content in hashes.items()}
    return {path: content for path, content in hub.repo(PLACE).files.items() if path != ".gitattributes"}


def stored_step(hub: HubServer) -> int:
    """Return the step of the checkpoint on the Hub, and check that it is whole and that nothing else is there."""
    files = stored(hub)
    record = json.loads(files.pop("checkpoint.json"))
    assert {f"{record['folder']}/{name}" for name in record["files"]} == files.keys()
    return record["step"]


def write_run(folder: Path, step: int, settings: dict[str, Any], **progress: Any) -> Path:
    """Write what a run has at a checkpoint, with contents of the step in the place of weights."""
    checkpoint = folder / f"checkpoint-{step}"
    contents = {
        "unet/config.json": json.dumps({"sample_size": 8, "_name_or_path": str(folder / "another-model")}),
        "unet/diffusion_pytorch_model.safetensors": f"weights {step}",
        "optimizer.safetensors": f"moments {step}",
        "progress.json": json.dumps({"step": step, "images": 4 * step, "bad_steps_began": "", **progress}),
    }
    for name, content in contents.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(content)
    files = {name: {"size": len(text), "sha256": sha256(checkpoint / name)} for name, text in contents.items()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))
    config = TrainingConfig(**{**settings, "output_dir": str(folder)})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_to_save(config)))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(1, step + 1)))
    (folder / "tracker.json").write_text('{"id": "0123abcd"}')
    (folder / "previews").mkdir(exist_ok=True)
    (folder / f"previews/step-{step:07d}.png").write_bytes(b"picture %d" % step)
    return folder
