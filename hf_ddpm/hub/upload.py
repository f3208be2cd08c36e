"""A run on its way to the Hub.

    push      the files named in UPLOADED, and no others, as one commit; none if nothing has changed
    stage     a copy of them, which training cannot change any more

Visibility is decided when a repository is made: private unless `public` is asked for. A README that was edited on the
Hub keeps what its author wrote. Tokens go to the client of huggingface_hub and nowhere else.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.download import hub_error, status_of
from hf_ddpm.hub.readme import merged, own_text
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.runtime.files import in_a_line, read_mapping, read_metrics, weights_sha256, write_atomically
from hf_ddpm.runtime.run_files import EVALUATION_PICTURES
from hf_ddpm.timesteps import FILE as SEARCHED

# Patterns of `glob`, anchored at the run's folder: no checkpoint, log, optimizer state or pickle has such a name.
UPLOADED = (
    *("README.md", "config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", "evaluation.json", "average.json"),
    *("figures/*.png", "figures/*.gif"),
    *("model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"),
)
OF_EVALUATION = ("evaluation.json", *(f"figures/{name}" for name in EVALUATION_PICTURES))
# Of an earlier push, these would contradict what is pushed.
REPLACED = (
    *("average.json", "run.json", "eval.jsonl", "figures/kid.png", "figures/val_loss.png"),
    *(*OF_EVALUATION, "scheduler/searched_timesteps.json"),
    *("unet/*.safetensors", "unet/*.bin", "unet/*.index.json", "diffusion_pytorch_model.*"),
)
# Where something is on this machine, which is of no use elsewhere.
PLACES = ("cache_dir", "output_dir", "eval_network_path")
MAX_CONFLICTS = 3
LOCAL_ERRORS = (LookupError, TypeError, AttributeError, FileNotFoundError, PermissionError, IsADirectoryError)
NO_TOKEN = "there is no token: hf auth login, or HF_TOKEN in the environment"
KEPT_README = "README.md was edited on the Hub, too: it keeps the text that was written there"


@dataclass(frozen=True)
class Pushed:
    """Where a push went.

    Args:
        commit: the head of the branch; `is_new` if this push made it.
        kept_readme: the README on the Hub was edited there and here, and keeps the text that was written there.
    """

    repo_id: str
    url: str
    commit: str
    is_new: bool
    kept_readme: bool


def push(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str = "main",
    token: str | None = None,
    message: str | None = None,
    averages: bool = False,
) -> Pushed:
    """Uploads a run or any folder with a pipeline; the repository is made if need be.

    Args:
        repo_id: `name`, which goes to the token's owner, or `namespace/name`.
        public: make the repository public. One that exists keeps its visibility; without `public` it must be private.
        revision: a branch, made from `main` if need be.
        token: default: that of `hf auth login` or HF_TOKEN.
        message: of the commit; default: the run's step and images.
        averages: also push each average in `ema` of the run as a branch with its name.

    Raises:
        UsageError: `folder` holds no model that may be published.
        PushError: the Hub refused, or could not be reached.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    api = HfApi(token=token)
    name = create(api, repo_id, public)
    message = message or progress_of(folder)
    files = stage(folder)
    try:
        before = _text(files / "README.md")
        pushed = commit(api, files, name, revision, message)
        with suppress(OSError):  # a folder that cannot be written, from which all has arrived
            if pushed.kept_readme or _text(folder / "README.md") != before:  # what was written here is nowhere else
                write_card(folder, name, _branch(revision))
            else:
                write_atomically(folder / "README.md", (files / "README.md").read_bytes())
    finally:
        shutil.rmtree(files)
    for average in _averages(folder) if averages else ():
        files = stage(folder, model=average)
        try:
            commit(api, files, name, average.name, f"{message}, the average {average.name}")
        finally:
            shutil.rmtree(files)
    return pushed


def create(api: HfApi, repo_id: str, public: bool) -> str:
    """Makes a model repository unless it is there. Returns: its full name. Raises: PushError."""
    with explained(api, repo_id):
        name = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
        if not public and not api.model_info(name).private:
            raise PushError(
                f"{name} must be private unless you ask for a public one, but it exists and is public: push it "
                "publicly (--public; in training --hub_private_repo False), or give another name",
                is_transient=False,
            )
        return name


def progress_of(folder: Path) -> str:
    """What a commit says of the run in `folder`: "Step 1,200, 76,800 images"."""
    progress = read_mapping(folder / "run.json").get("training")
    if progress is None and (folder / "metrics.jsonl").is_file():
        progress = next(
            ({**line, "steps": line["step"]} for line in read_metrics(folder / "metrics.jsonl")[-1:]), None
        )
    return f"Step {progress['steps']:,}, {progress['images']:,} images" if progress else "Upload a model"


def stage(folder: Path, model: Path | None = None, preview: Path | None = None) -> Path:
    """A new folder with what is uploaded of a run, as it is now: training goes on and replaces its files.

    Args:
        model: an average in the place of the run's own pipeline, without what was measured and drawn with that.
        preview: the picture of samples, if there is none.
    """
    place = folder if os.access(folder, os.W_OK) else None
    files = Path(tempfile.mkdtemp(prefix=f"partial-push-{os.getpid()}-", dir=place))
    try:
        chosen = {name: folder / name for name in _uploaded(folder)}
        if model is not None:
            of_own_model = ("unet/*", "model_index.json", "scheduler/*", "evaluation.json", "figures/*")
            chosen = {n: path for n, path in chosen.items() if not any(fnmatch(n, p) for p in of_own_model)}
            chosen |= {name: model / name for name in _uploaded(model) if name != "README.md"}
        if preview is not None:
            chosen["figures/samples.png"] = preview
        weights = weights_sha256(model or folder)
        searched = SEARCHED.as_posix()
        for name, of_weights in (("evaluation.json", OF_EVALUATION), (searched, (searched,))):
            if read_mapping(chosen.get(name, folder / name)).get("weights_sha256") != weights:
                chosen = {n: path for n, path in chosen.items() if n not in of_weights}
        for name, source in chosen.items():
            (files / name).parent.mkdir(exist_ok=True)
            _link_or_copy(source, files / name)
            if name.endswith((".json", ".yaml")):
                content = read_mapping(files / name)
                known = _without_places(content)
                if known != content:
                    is_json = name.endswith(".json")
                    text = json.dumps(known, indent=2) if is_json else yaml.safe_dump(known, sort_keys=False)
                    write_atomically(files / name, text)
        for halflife in read_mapping(folder / "config.yaml").get("ema_halflife_images") or ():
            if model is not None and model.name == f"halflife-{halflife:g}":
                write_atomically(files / "average.json", json.dumps({"halflife_images": halflife}) + "\n")
    except BaseException:
        shutil.rmtree(files, ignore_errors=True)
        raise
    return files


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        if source.suffix != ".safetensors":  # which are replaced, never written into
            raise OSError
        os.link(source.resolve(), target)  # the Hub's cache is of symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _without_places(value: Any) -> Any:
    """Of paths of this machine only the last names: the others say where something is, and not what."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in PLACES}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "."))):
        return Path(value).name
    return value


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"output_dir must hold a saved model, got {str(folder)!r} without model_index.json")
    if not any(name.endswith(".safetensors") for name in _uploaded(folder)):
        raise UsageError(f"output_dir must hold weights as safetensors, got {str(folder)!r} without")
    for name, part in read_mapping(folder / "model_index.json").items():
        if isinstance(part, list) and str(part[0]).split(".")[0] == "hf_ddpm":
            raise UsageError(
                f"model_index.json must name classes of diffusers, got a {name} of {part[0]}, which diffusers does "
                "not load: save the model with hf_ddpm.DDPMPipeline"
            )
    if read_mapping(folder / "config.yaml").get("hub_token"):
        raise UsageError(f"hub_token must not be published, but is set in {folder / 'config.yaml'}: delete that line")


def _uploaded(folder: Path) -> list[str]:
    """Lists no folder but those in UPLOADED: others, as of checkpoints and pushes, can go while they are listed."""
    found = (path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _averages(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("ema/*/model_index.json"))


def commit(
    api: HfApi,
    files: Path,
    name: str,
    revision: str,
    message: str,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Pushed:
    """One commit of a staged folder on a branch, whose README is left in `files`.

    Args:
        is_wanted: asked before the commit is made, which may be long after the upload began.
    """
    with explained(api, name):
        if revision != "main":
            api.create_branch(name, branch=revision, exist_ok=True)
        for attempt in range(MAX_CONFLICTS):
            head = str(api.model_info(name, revision=revision).sha)
            there = api.list_repo_files(name, revision=head)
            readme, kept = _readme(api, files, name, revision, head if "README.md" in there else None)
            names = [n for n in _uploaded(files) if n != "README.md"]
            operations: list[Any] = [CommitOperationAdd(n, files / n) for n in names]
            operations.append(CommitOperationAdd("README.md", readme.encode()))
            stale = [n for n in there if n not in names and any(fnmatch(n, pattern) for pattern in REPLACED)]
            for operation in operations:
                if fnmatch(operation.path_in_repo, "*.safetensors") or operation.path_in_repo.startswith("figures/"):
                    # One by one: for several the client starts threads, for which Python waits before it ends.
                    api.preupload_lfs_files(name, [operation], revision=revision)
            operations += [CommitOperationDelete(n) for n in stale]
            if not is_wanted():
                raise PushError("a newer state goes in its place")
            try:
                made = api.create_commit(
                    name, operations, commit_message=message, revision=revision, parent_commit=head
                )
            except HfHubHTTPError as error:  # somebody committed in between
                if status_of(error) != 412 or attempt == MAX_CONFLICTS - 1:
                    raise
                continue
            write_atomically(files / "README.md", readme)
            return Pushed(name, made.repo_url.url, made.oid, made.oid != head, kept)
    raise AssertionError


def _readme(api: HfApi, files: Path, name: str, revision: str, head: str | None) -> tuple[str, bool]:
    """The README of the next commit, and whether a text of the Hub was kept in the place of another here."""
    here = write_card(files, name, _branch(revision)).read_text("utf-8")
    if head is None:
        return here, False
    path = Path(api.hf_hub_download(name, "README.md", revision=head))
    plain = {"", f"# {name.split('/')[-1]}"}
    try:
        there = path.read_text("utf-8")
        ours, theirs = own_text(here), own_text(there)
        if theirs in plain or ("\n" not in theirs and ours.startswith(theirs)):  # a title at most
            card: Any = ModelCard(there, ignore_metadata_errors=True)
            card.text = ModelCard(here).text
            return merged(str(card), here), False
        return merged(there, here), ours not in plain and ours not in theirs
    except (ValueError, yaml.YAMLError) as error:
        message = f"README.md of {name} cannot be read: {in_a_line(error)}: correct it on the Hub, or delete it there"
        raise PushError(message, is_transient=False) from error


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", errors="replace") if path.is_file() else None


def _branch(revision: str) -> str | None:
    """As a card names it: `main` is not named."""
    return None if revision == "main" else revision


@contextmanager
def explained(api: HfApi, name: str) -> Iterator[None]:
    """What the client raises as a PushError, which says what to do; without the token."""
    try:
        yield
        return
    except (PushError, UsageError):
        raise
    except OfflineModeIsEnabled as error:
        raise PushError("HF_HUB_OFFLINE is set: unset it, and push again", is_transient=False) from error
    except LocalTokenNotFoundError as error:
        raise PushError(NO_TOKEN, is_transient=False) from error
    except HFValidationError as error:
        raise PushError(f"{name!r} cannot name a repository: {error}", is_transient=False) from error
    except Exception as error:  # of the network, in many types, none of which huggingface_hub documents
        first = hub_error(error)
        token, status = _token_of(api), status_of(first)
        if status is not None:
            said = str(getattr(first, "server_message", None) or f"HTTP {status}")
            text, is_transient = _said_of(status, name, said)
            text = NO_TOKEN if status == 401 and not token else text
            cause = f"{text} ({said})"
        elif isinstance(first, LOCAL_ERRORS):
            cause, is_transient = f"the files here cannot be pushed ({first!r})", False
        else:
            cause, is_transient = f"{api.endpoint} cannot be reached, or the connection broke ({first!r})", True
    raise PushError(cause.replace(token, "hf_...") if token else cause, is_transient) from None


def _token_of(api: HfApi) -> str:
    """The one that is sent, without the ends that an error may show in other characters; "" if there is none."""
    return str(api.token or get_token() or "").strip()


def _said_of(status: int, name: str, said: str) -> tuple[str, bool]:
    if status in (402, 413, 507) or (status == 403 and "storage" in said.lower()):
        return f"{name} would be larger than the Hub's limits for it", False
    if status == 401:
        return "the Hub does not accept the token: it is wrong or expired, hf auth login makes a new one", False
    if status == 403:
        return f"the token may not write to {name}: give one with write access, or another name", False
    if status == 404:
        return f"{name} is not there, or the token may not see it", False
    if status == 409:
        return f"the name {name} is taken by something else: give another", False
    if status == 412:
        return f"others are committing to {name} at the same time", True
    if status == 429:
        return "the Hub asks for fewer requests", True
    if status >= 500:
        return "the Hub has an error of its own", True
    return f"the Hub refuses what was sent to {name}", False
