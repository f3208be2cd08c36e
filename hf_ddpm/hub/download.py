"""A trained model, in a folder or on the Hub: where it is, and what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_ddpm.runtime.errors import UsageError

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
    parts = {name for name, part in index.items() if isinstance(part, list) and part[1] is not None}
    if index.get("unet", ["", ""])[1] != "UNet2DModel" or parts != {"unet", "scheduler"}:
        raise UsageError(
            f"model must be a DDPMPipeline of a UNet2DModel and a scheduler, got {str(model)!r}, a "
            f"{index.get('_class_name')} of {', '.join(sorted(parts))}"
        )
    return folder, repo_id


def hub_error(error: BaseException) -> BaseException:
    """The error of the Hub's client from which another one was raised; or else the first of all."""
    while not isinstance(error, HfHubHTTPError) and (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def status_of(error: BaseException) -> int | None:
    """What the Hub has answered; None if it has not."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return None if response is None else int(response.status_code)


def _why(error: BaseException) -> str:
    status = status_of(hub_error(error))
    if status in (401, 403, 404):
        return f"shown to you: it is not on the Hub, or private, which needs hf auth login (HTTP {status})"
    return f"reachable ({type(error).__name__}{'' if status is None else f', HTTP {status}'})"
