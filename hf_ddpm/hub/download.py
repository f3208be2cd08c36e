"""A trained model, in a folder or on the Hub: where it is, and whether it is one."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ddpm.condition import CONDITIONAL_NETWORK
from hf_ddpm.hub.errors import hub_error, status_of
from hf_ddpm.hub.token import check_token
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import NETWORK_FOLDERS, look_at, read_mapping
from hf_ddpm.runtime.run_files import MODEL_INDEX, REPLACED_RUN


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form NAMESPACE/NAME of a repository on the Hub, and is not a path that exists."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and name.isascii() and not Path(name).exists()


def local_folder(model: str | Path) -> Path | None:
    """Return the folder of a saved pipeline, or None for the name of a repository on the Hub.

    Raises:
        UsageError: When `model` is neither, or a folder without a pipeline.
    """
    folder = look_at("model", model)
    if not folder.exists():
        if is_hub_id(str(model)):
            return None
        raise UsageError(
            "model must be a folder with model_index.json or a Hub id, which is NAMESPACE/NAME, "
            f"got {str(model)!r}, which is neither"
        )
    if not (folder / "model_index.json").is_file():
        hint = ": the run has not saved its model yet" if (folder / "config.yaml").is_file() else ""
        if (folder / REPLACED_RUN / MODEL_INDEX).is_file():
            hint += f", the model of the run before it is in {str(folder / REPLACED_RUN)!r}"
        raise UsageError(f"model must be a folder with model_index.json, got {str(model)!r}, which has none{hint}")
    return folder


def find_model(model: str | Path) -> tuple[Path, str | None]:
    """Return the folder of a saved pipeline, downloaded if need be, and its Hub id if it came from there.

    Raises:
        UsageError: When there is no such model, or it is not a pipeline of a network and a scheduler, or one of
            its configs is damaged.
    """
    folder = local_folder(model)
    repo_id = None
    if folder is None:
        repo_id = str(model)
        folder = _download(repo_id)
    remedy = "save or download the model again"
    index = read_mapping(folder / "model_index.json", remedy)
    classes = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    components = {name for name, value in classes.items() if value is not None}
    # Our pipeline takes any network that `train` was given; those of other pipelines are for other inputs.
    is_ours = index.get("_class_name") == "DDPMPipeline" or classes.get("unet") == "UNet2DModel"
    is_ours = is_ours or CONDITIONAL_NETWORK in classes
    if not is_ours or components not in ({"unet", "scheduler"}, {CONDITIONAL_NETWORK, "scheduler"}):
        raise UsageError(
            f"model must be a DDPMPipeline of a network and a scheduler, got {str(model)!r}, a "
            f"{index.get('_class_name')} of {', '.join(sorted(components))}"
        )
    configs = [folder / network / "config.json" for network in (*NETWORK_FOLDERS, "")]
    for config in (*configs, folder / "scheduler/scheduler_config.json", folder / "scheduler_config.json"):
        read_mapping(config, remedy)
    return folder, repo_id


def _download(repo_id: str) -> Path:
    """Return the folder in the Hub's cache that holds a pipeline, with the settings and facts of its run."""
    check_token()
    try:
        # The class that model_index.json names, which `DiffusionPipeline` would look for, may be none of diffusers.
        from diffusers import DDPMPipeline

        folder = Path(str(DDPMPipeline.download(repo_id)))
        snapshot_download(repo_id, allow_patterns=["config.yaml", "run.json", "guide/*"])
    except Exception as error:  # a broken connection has no type that huggingface_hub documents
        raise UsageError(
            f"model must be a folder or on the Hub, got {repo_id!r}, which is neither here nor "
            f"{_explain_failed_download(error)}"
        ) from error
    return folder


def _explain_failed_download(error: BaseException) -> str:
    status = status_of(hub_error(error))
    if status in (401, 403, 404):
        return f"shown to you: it is not on the Hub, or private, which needs hf auth login (HTTP {status})"
    return f"reachable ({type(error).__name__}{'' if status is None else f', HTTP {status}'})"
