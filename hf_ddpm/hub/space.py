"""A model's page: on this machine, or as a Space of the Hub.

A Space consists of

    app.py             `space_app/app.py`, as it is but for the line that names the model
    hf_ddpm/           the modules of this package that the page imports, as they are
    requirements.txt   what they import from elsewhere, in the versions that are installed here
    README.md          a card with the metadata from which the Hub builds the Space
"""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, SpaceCard, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError

from hf_ddpm.condition import is_conditional
from hf_ddpm.hub.download import is_hub_id, local_folder
from hf_ddpm.hub.errors import as_push_errors
from hf_ddpm.hub.readme import named_repository
from hf_ddpm.hub.token import check_token
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, write_atomically

PACKAGE = Path(__file__).resolve().parents[1]
APP = PACKAGE / "hub" / "space_app" / "app.py"
NO_MODEL = 'MODEL = os.environ.get("MODEL", "")'
# Local versions such as 2.13.0+cpu are newer than 2.13.0 to pip: of the two indexes, it takes the one without CUDA.
CPU_ONLY = "--extra-index-url https://download.pytorch.org/whl/cpu"
FILES = ("app.py", "requirements.txt", "README.md", "hf_ddpm/*")


def run_demo(model: str, port: int = 7860, mcp_server: bool = False) -> None:
    """Serve the page of a model on this machine until it is interrupted.

    Args:
        model: A folder that holds a pipeline, or a Hub id.
        port: The port of http://127.0.0.1.
        mcp_server: Whether agents find what the page does as tools, by the Model Context Protocol.

    Raises:
        UsageError: When gradio or what it needs for `mcp_server` is not installed, the folder holds no model, or the
            port is taken.
        OSError: When the Hub has no such model.
    """
    _check_gradio()
    if mcp_server and find_spec("mcp") is None:
        raise UsageError('mcp_server needs the package mcp, which is not installed: pip install "gradio[mcp]"')
    folder = local_folder(model)
    _check_has_page(folder, model)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that has just been closed
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"port must be free, got {port}: {error.strerror}; give another --port") from error
    # What the app reads on a Space.
    os.environ.update(
        MODEL=str(folder.resolve()) if folder else model,
        GRADIO_SERVER_PORT=str(port),
        GRADIO_NUM_PORTS="1",  # else it tries the 99 after it
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_MCP_SERVER=str(mcp_server),
    )
    print(f"The page of {model} is made: gradio, torch and the model are loaded first. Ctrl-C ends it.", flush=True)
    if mcp_server:
        print(f"Agents will find its tools at http://127.0.0.1:{port}/gradio_api/mcp/", flush=True)
    runpy.run_path(str(APP), run_name="__main__")


def model_id_of(model: str, model_id: str | None = None) -> str:
    """Return the Hub id of a model: the given one, the run's `hub_model_id`, or what its card loads.

    Args:
        model: The folder of a run, or a Hub id.
        model_id: The Hub id, if the user gave one.

    Raises:
        UsageError: When the model has no Hub id, or one that is not `namespace/name`.
    """
    folder = local_folder(model)
    if model_id is None:
        model_id = model if folder is None else _recorded_hub_id(folder)
    if model_id is None or not is_hub_id(model_id):
        raise UsageError(
            f"a Space loads its model from the Hub by namespace/name, got {model_id!r} for {model!r}: "
            "upload the model, and give --model_id"
        )
    return model_id


def _recorded_hub_id(folder: Path) -> str | None:
    readme = folder / "README.md"
    candidates = (
        read_mapping(folder / "config.yaml").get("hub_model_id"),
        named_repository(readme.read_text(encoding="utf-8")) if readme.is_file() else None,
    )
    return next((name for name in candidates if name and is_hub_id(name)), None)


def write_space(model: str, model_id: str, out: Path) -> None:
    """Write the files of a Space into a folder, which is made if need be.

    Args:
        model: A folder with a card, for its license, or a Hub id.
        model_id: The model that the app loads, `namespace/name`.
        out: A new folder, or one that holds a Space of this package.

    Raises:
        UsageError: When gradio is not installed, the folder holds no model, or `out` holds another app.
    """
    _check_gradio()
    folder = local_folder(model)
    _check_has_page(folder, model)
    source = APP.read_text(encoding="utf-8")
    assert source.count(NO_MODEL) == 1
    first_line = source.partition("\n")[0]
    app = out / "app.py"
    if app.exists() and not app.read_text(encoding="utf-8").startswith(first_line):
        raise UsageError(f"out must be a new folder or one of a Space, got {str(out)!r} with another app.py")
    modules = imported_modules(APP)
    requirements = [CPU_ONLY, *(f"{name}~={_installed(name)}" for name in _required_packages([APP, *modules]))]
    card = _space_card(model_id, None if folder is None else _license_of(folder))
    shutil.rmtree(out / "hf_ddpm", ignore_errors=True)  # another version may have had other modules
    for path in modules:
        write_atomically(out / "hf_ddpm" / path.relative_to(PACKAGE), path.read_bytes())
    write_atomically(app, source.replace(NO_MODEL, f'MODEL = os.environ.get("MODEL", "{model_id}")'))
    write_atomically(out / "requirements.txt", "\n".join(requirements) + "\n")
    write_atomically(out / "README.md", str(card))


def imported_modules(app: Path) -> list[Path]:
    """Return the files of this package that must be there for a script to run, in the order of their paths.

    They are the modules that the script imports, those that these import, and so on, with the `__init__.py` of each
    of their packages. Imports inside functions count. Those under `if TYPE_CHECKING` do not: they are never executed.
    """
    files: set[Path] = set()
    unread = [app]
    while unread:
        for name, _ in _imports(unread.pop()):
            new_files = set(_module_files(name)) - files
            files |= new_files
            unread += new_files
    return sorted(files)


def _required_packages(files: list[Path]) -> list[str]:
    """Return the names on PyPI of the packages that files import when they are loaded.

    A package that only a function imports is not required: the page offers nothing that needs it.
    """
    names = {name.partition(".")[0] for path in files for name, is_lazy in _imports(path) if not is_lazy}
    distributions = packages_distributions()
    external = names - set(sys.stdlib_module_names) - {"hf_ddpm"}
    return sorted({distributions[name][0].lower() for name in external})


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the names that a file imports, and whether it does so only when a function is called.

    `from a import b` yields `a.b`, since b may be a module.
    """
    pending = [(node, False) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    while pending:
        node, is_lazy = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", is_lazy) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += [(child, is_lazy) for child in node.orelse]
        else:
            is_lazy = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            pending += [(child, is_lazy) for child in ast.iter_child_nodes(node)]


def _module_files(name: str) -> Iterator[Path]:
    """Yield the files of this package that importing `name`, a module or something in it, executes."""
    package, *parts = name.split(".")
    if package != "hf_ddpm":
        return
    folder = PACKAGE
    yield folder / "__init__.py"
    for part in parts:
        if (folder / f"{part}.py").is_file():
            yield folder / f"{part}.py"
            return
        folder /= part
        if not (folder / "__init__.py").is_file():
            return
        yield folder / "__init__.py"


def _space_card(model_id: str, license: str | None) -> SpaceCard:
    name = model_id.partition("/")[2]
    data = SpaceCardData(
        title=name,
        emoji="🌫️",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=_installed("gradio"),
        # The Hub's default is older than diffusers accepts.
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        pinned=False,
        license=license,
        models=[model_id],
        short_description="A diffusion model: from noise to images, and back",
    )
    text = (
        f"# {name}\n\nThis page samples the diffusion model [`{model_id}`](https://huggingface.co/{model_id}). "
        "It shows how noise becomes an image, and how an image becomes noise. It edits images.\n\n"
        "If the model is private or gated, add a secret `HF_TOKEN` that may read it to the settings of the Space. "
        "On a GPU, delete the first line of requirements.txt.\n"
    )
    return SpaceCard(f"---\n{data}\n---\n\n{text}")


def _license_of(folder: Path) -> str | None:
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    with naming_damage(f"{readme} cannot be read", "correct it, or delete it"):
        return ModelCard.load(readme).data.get("license")


def push_space(folder: Path, space_id: str, model_id: str, public: bool = False) -> str:
    """Upload a Space that `write_space` wrote in one commit, or in none if nothing has changed.

    Args:
        folder: The folder of the Space.
        space_id: `name`, which goes to the token's owner, or `namespace/name`. It is created private if need be.
        model_id: The model of the Space, which must be on the Hub.
        public: Create the Space public. One that exists keeps its visibility; without `public` it must be private.

    Returns:
        The address of the Space, and what is left to do so that it can read its model, if there is anything.

    Raises:
        UsageError: When the model is not on the Hub, or the Space exists and is public.
        PushError: When the Hub cannot be reached, or refuses.
    """
    check_token()
    api = HfApi()
    with as_push_errors(api, space_id):
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
        allow_patterns=list(FILES),
        delete_patterns="hf_ddpm/*",  # modules of another version
        commit_message="Show the model",
    )
    if not model.private and not model.gated:
        return str(address)
    kind = "private" if model.private else "gated"
    return f"{address}\n{model_id} is {kind}: add a secret HF_TOKEN that may read it, in {address}/settings"


def _check_has_page(folder: Path | None, model: str) -> None:
    """Check that the page can show a model, as far as it is here."""
    if folder is not None and is_conditional(folder):
        raise UsageError(
            f"model must be one that makes images from noise alone, got {model!r}, which makes them from images: "
            "there is no page for it; hf-ddpm sample MODEL --image FILE_OR_FOLDER"
        )


def _check_gradio() -> None:
    if find_spec("gradio") is None:
        raise UsageError('the page needs gradio, which is not installed: pip install "hf_ddpm[demo]"')


def _installed(name: str) -> str:
    """Return the version of an installed package, without its local part: 2.13.0+cpu -> 2.13.0."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        raise UsageError(f"the Space's versions are those of this environment, which has no {name}") from None
