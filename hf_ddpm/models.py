"""A trained model, in a folder or on the Hub: where it is, and what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_ddpm.config import UsageError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_model(model: str | Path) -> tuple[Path, str | None]:
    """The folder of a pipeline, downloaded if need be, and its name if it is on the Hub.

    Raises:
        UsageError: there is none, or of something else than a UNet2DModel and a scheduler.
    """
    folder, repo_id = Path(model).expanduser(), None
    if not folder.exists() and HUB_ID.fullmatch(str(model)):
        repo_id = str(model)
        try:
            folder = Path(str(DiffusionPipeline.download(repo_id)))
            snapshot_download(repo_id, allow_patterns=["config.yaml", "run.json"])
        except Exception as error:  # a broken connection has no type that huggingface_hub documents
            raise UsageError(
                f"model must be a folder or on the Hub, got {repo_id!r}, which is neither here nor {_why(error)}"
            ) from error
    if not (folder / "model_index.json").is_file():
        hint = ": the run has not saved its model yet" if (folder / "config.yaml").is_file() else ""
        raise UsageError(f"model must be a folder with model_index.json, got {str(model)!r}, which has none{hint}")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index.get("unet", ["", ""])[1] != "UNet2DModel":
        raise UsageError(
            f"model must be a DDPMPipeline of a UNet2DModel and a scheduler, got {str(model)!r}, a "
            f"{index.get('_class_name')}"
        )
    return folder, repo_id


def _why(error: BaseException) -> str:
    found: BaseException | None = error
    while found is not None and not isinstance(found, HfHubHTTPError):
        found = found.__cause__ or found.__context__
    status = None if found is None else found.response.status_code
    if status in (401, 403, 404):
        return f"shown to you: it is not on the Hub, or private, which needs hf auth login (HTTP {status})"
    return f"reachable ({type(error).__name__}{'' if status is None else f', HTTP {status}'})"
