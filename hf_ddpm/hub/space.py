"""A model's page: on this machine, or as a Space of the Hub.

A Space is three files: `space_app/app.py` as it is but for the line that names the model, requirements.txt with the
versions that are installed here, and a card whose metadata the Hub builds it from.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, SpaceCard, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError

from hf_ddpm.hub.readme import named_repository
from hf_ddpm.hub.upload import explained
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import write_atomically

APP = Path(__file__).parent / "space_app" / "app.py"
NO_MODEL = 'MODEL = os.environ.get("MODEL", "")'
FULL_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Local versions such as 2.13.0+cpu are newer than 2.13.0 to pip: of the two places it takes the one without CUDA.
CPU_ONLY = "--extra-index-url https://download.pytorch.org/whl/cpu"
REQUIRED = ("torch", "diffusers", "gradio")


def run_demo(model: str, port: int = 7860) -> None:
    """Serves the page of a model on this machine until it is interrupted.

    Args:
        model: a folder that holds a pipeline, or a Hub id.
        port: of http://127.0.0.1.

    Raises:
        UsageError: gradio is not installed, or the folder holds no model.
        OSError: the port is taken, or the Hub has no such model.
    """
    _check_gradio()
    folder = _folder_of(model)
    # What the app reads on a Space.
    os.environ.update(
        MODEL=str(folder.resolve()) if folder else model,
        GRADIO_SERVER_PORT=str(port),
        GRADIO_ANALYTICS_ENABLED="False",
    )
    runpy.run_path(str(APP), run_name="__main__")


def model_id_of(model: str, model_id: str | None = None) -> str:
    """The Hub id of a model: `model_id`, what config.yaml calls hub_model_id, what its card loads, or the id itself.

    Raises:
        UsageError: it is not known, or is not `namespace/name`.
    """
    folder = _folder_of(model)
    config = folder / "config.yaml" if folder else None
    if model_id is None and folder is None:
        model_id = model
    elif model_id is None and folder is not None:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config and config.is_file() else {}
        card = folder / "README.md"
        named = named_repository(card.read_text(encoding="utf-8")) if card.is_file() else None
        candidates = [settings.get("hub_model_id"), named]
        model_id = next((found for found in candidates if found and FULL_HUB_ID.fullmatch(found)), None)
    if model_id is None or not FULL_HUB_ID.fullmatch(model_id):
        raise UsageError(
            f"a Space loads its model from the Hub by namespace/name, got {model_id!r} for {model!r}: "
            "upload the model, and give --model_id"
        )
    return model_id


def write_space(model: str, model_id: str, out: Path) -> None:
    """Writes a Space's app.py, requirements.txt and README.md into `out`, which is made if need be.

    Args:
        model: a folder with a card, for its license, or a Hub id.
        model_id: what the app loads, `namespace/name`.

    Raises:
        UsageError: gradio is not installed, the folder holds no model, or a file in `out` is of something else.
    """
    _check_gradio()
    folder = _folder_of(model)
    source = APP.read_text(encoding="utf-8")
    assert source.count(NO_MODEL) == 1
    first_line = source.partition("\n")[0]
    if (out / "app.py").exists() and not (out / "app.py").read_text(encoding="utf-8").startswith(first_line):
        raise UsageError(f"out must be a new folder or one of a Space, got {str(out)!r} with another app.py")
    card = folder / "README.md" if folder else None
    license = ModelCard.load(card).data.get("license") if card and card.is_file() else None
    name = model_id.partition("/")[2]
    data = SpaceCardData(
        title=name,
        emoji="🌫️",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=_installed("gradio"),
        # The Hub's own choice is older than diffusers takes.
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        pinned=False,
        license=license,
        models=[model_id],
        short_description="A diffusion model: from noise to images, and back",
    )
    text = (
        f"# {name}\n\nSamples of the diffusion model [`{model_id}`](https://huggingface.co/{model_id}), the way from "
        "noise to an image, and the way of an image into noise.\n\nIf the model is private or gated, add a secret "
        "`HF_TOKEN` that may read it in the Space's settings. On a GPU delete the first line of requirements.txt.\n"
    )
    requirements = [CPU_ONLY, *(f"{name}~={_installed(name)}" for name in REQUIRED)]
    write_atomically(out / "app.py", source.replace(NO_MODEL, f'MODEL = os.environ.get("MODEL", "{model_id}")'))
    write_atomically(out / "requirements.txt", "\n".join(requirements) + "\n")
    write_atomically(out / "README.md", str(SpaceCard(f"---\n{data}\n---\n\n{text}")))


def push_space(folder: Path, space_id: str, model_id: str, public: bool = False, token: str | None = None) -> str:
    """Uploads a Space that `write_space` wrote, in one commit; in none if nothing changed.

    Args:
        space_id: `name`, which goes to the token's owner, or `namespace/name`; created if need be, private.
        model_id: of its model, which must be on the Hub.
        public: create it public. An existing Space keeps its visibility, and must be private without this.
        token: default: the one of `hf auth login`.

    Returns: the Space's address, and what is left to do for the app to read its model, if anything.

    Raises:
        UsageError: the model is not on the Hub, or the Space exists and is public.
        PushError: the Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    with explained(api, space_id):
        return _push_space(api, folder, space_id, model_id, public)


def _push_space(api: HfApi, folder: Path, space_id: str, model_id: str, public: bool) -> str:
    try:
        model = api.model_info(model_id)
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"the model must be on the Hub, where the Space loads it, got {model_id!r}, which is not there or not "
            "yours to read: push it first, or give --model_id"
        ) from error
    address = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=not public, exist_ok=True)
    if not public and not api.space_info(address.repo_id).private:
        raise UsageError(
            f"{address.repo_id} exists and is public: give --public, or change its visibility in its settings"
        )
    api.upload_folder(
        repo_id=address.repo_id,
        repo_type="space",
        folder_path=folder,
        allow_patterns=["app.py", "requirements.txt", "README.md"],
        commit_message="Show the model",
    )
    if not model.private and not model.gated:
        return str(address)
    kind = "private" if model.private else "gated"
    return f"{address}\n{model_id} is {kind}: add a secret HF_TOKEN that may read it, in {address}/settings"


def _folder_of(model: str) -> Path | None:
    """The folder called `model`, None for a Hub id. Raises: UsageError for neither, or for no model in it."""
    folder = Path(model)
    if not folder.exists():
        if not FULL_HUB_ID.fullmatch(model):
            raise UsageError(f"model must be a folder or a Hub id, got {model!r}, which is neither")
        return None
    if not (folder / "model_index.json").is_file():
        hint = ": the run has not saved its model yet" if (folder / "config.yaml").is_file() else ""
        raise UsageError(f"model must be a folder with model_index.json, got {model!r}, which has none{hint}")
    return folder


def _check_gradio() -> None:
    if find_spec("gradio") is None:
        raise UsageError('the page needs gradio, which is not installed: pip install "hf_ddpm[demo]"')


def _installed(name: str) -> str:
    """A package's version, without the local part: 2.13.0+cpu -> 2.13.0."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        raise UsageError(f"the Space's versions are those of this environment, which has no {name}") from None
