"""The push of a model to the Hub: the files of a run that `runtime/run_files.py` marks as uploaded, and no others.

A push is one commit, or none if nothing has changed. It is made from a copy of the files, since training may replace
them meanwhile. A new repository is private unless a public one is asked for. A README that was edited on the Hub keeps
what its author wrote. Tokens go to the client of huggingface_hub and nowhere else.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.errors import as_push_errors, status_of
from hf_ddpm.hub.readme import author_text, merge_readme
from hf_ddpm.hub.token import check_token
from hf_ddpm.runtime.errors import PushError, UsageError, in_one_line
from hf_ddpm.runtime.files import (
    look_at,
    parse_mapping,
    read_mapping,
    read_metrics,
    weights_sha256,
    write_atomically,
)
from hf_ddpm.runtime.run_files import OF_WEIGHTS, REPLACED, UPLOADED, VALID_WITH

# Settings that say where something is on this machine, which is of no use elsewhere.
LOCAL_SETTINGS = ("cache_dir", "output_dir", "eval_network_path")
MAX_ATTEMPTS = 3  # at a commit, while others commit to the same branch
KEPT_README = "README.md was edited on the Hub, too: it keeps the text that was written there"


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Args:
        repo_id: The repository, with its namespace.
        url: The repository's address.
        commit: The head of the branch.
        is_new: The push made that commit; otherwise nothing had changed.
        kept_readme: The README was edited both on the Hub and here, and keeps the text that was written there.
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
    """Upload a run, or any folder that holds a pipeline, into a repository that is created if need be.

    Args:
        folder: The folder of the run.
        repo_id: `name`, which goes to the token's owner, or `namespace/name`.
        public: Create the repository public. One that exists keeps its visibility; without `public` it must be
            private.
        revision: The branch, which is created from `main` if need be.
        token: Default: the token of `hf auth login` or HF_TOKEN.
        message: The commit's message. Default: the run's step and images.
        averages: Also push each average in the run's folder `ema`, as a branch with its name.

    Returns:
        Where the push of the run itself went.

    Raises:
        UsageError: When `folder` holds no model that may be published, or no request can carry the token.
        PushError: When the Hub refuses, or cannot be reached.
    """
    folder = look_at("run", folder)
    check_token(token)
    _check_publishable(folder)
    api = HfApi(token=token)
    name = create_repository(api, repo_id, public)
    message = message or describe_progress(folder)
    files = copy_for_upload(folder)
    try:
        readme_before = _read_text(files / "README.md")
        pushed = commit(api, files, name, revision, message)
        with suppress(OSError):  # the folder cannot be written, but everything in it has arrived
            if pushed.kept_readme or _read_text(folder / "README.md") != readme_before:
                # What was written into the README here is nowhere else.
                write_card(folder, name, _branch_on_card(revision))
            else:
                write_atomically(folder / "README.md", (files / "README.md").read_bytes())
    finally:
        shutil.rmtree(files)
    for average in _averages(folder) if averages else ():
        files = copy_for_upload(folder, model=average)
        try:
            commit(api, files, name, average.name, f"{message}, the average {average.name}")
        finally:
            shutil.rmtree(files)
    return pushed


def create_repository(api: HfApi, repo_id: str, public: bool) -> str:
    """Create a model repository unless it exists, and return its name with the namespace.

    Raises:
        PushError: When the repository cannot be created, or is public and must not be.
    """
    with as_push_errors(api, repo_id):
        name = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
        if not public and not api.model_info(name).private:
            raise PushError(
                f"{name} must be private unless you ask for a public one, but it exists and is public: push it "
                "publicly (--public; in training --no_hub_private_repo), or give another name",
                is_transient=False,
            )
        return name


def describe_progress(folder: Path) -> str:
    """Return how far a run is, for the message of a commit: "Step 1,200, 76,800 images"."""
    training = read_mapping(folder / "run.json").get("training")
    if training is not None:
        return f"Step {training['steps']:,}, {training['images']:,} images"
    lines = read_metrics(folder / "metrics.jsonl")
    if lines:
        return f"Step {lines[-1]['step']:,}, {lines[-1]['images']:,} images"
    return "Upload a model"


def copy_for_upload(
    folder: Path, model: Path | None = None, preview: Path | None = None, parent: Path | None = None
) -> Path:
    """Return a new folder with what is uploaded of a run as it is now; training may continue and replace its files.

    Paths on this machine are left out of the copies. Weights are hard links where the file system allows it.

    Args:
        folder: The folder of the run.
        model: The folder of an average, to upload it in the place of the run's own model. What was measured and
            drawn with that is then left out.
        preview: A picture of samples, to upload in the place of the finished run's.
        parent: Where the new folder is made. Default: the system's folder for temporary files.

    Raises:
        UsageError: When a file of the run is damaged.
        OSError: When a file cannot be read, or not be copied.
    """
    copies = Path(tempfile.mkdtemp(prefix="partial-push-", dir=parent))
    try:
        for name, source in _files_to_upload(folder, model, preview).items():
            (copies / name).parent.mkdir(exist_ok=True)
            copy_file(source, copies / name)
        for halflife in read_mapping(folder / "config.yaml").get("ema_halflife_images") or ():
            if model is not None and model.name == f"halflife-{halflife:g}":
                write_atomically(copies / "average.json", json.dumps({"halflife_images": halflife}) + "\n")
    except BaseException:
        shutil.rmtree(copies, ignore_errors=True)
        raise
    return copies


def _files_to_upload(folder: Path, model: Path | None, preview: Path | None) -> dict[str, Path]:
    """Return name in the repository -> file, without what was measured or searched with other weights."""
    sources = {name: folder / name for name in _uploaded_names(folder)}
    if model is not None:
        sources = {name: path for name, path in sources.items() if not _matches(name, OF_WEIGHTS)}
        sources |= {name: model / name for name in _uploaded_names(model) if name != "README.md"}
    if preview is not None:
        sources["figures/samples.png"] = preview
    weights = weights_sha256(model or folder)
    for naming_file, patterns in VALID_WITH.items():
        named_weights = None
        if naming_file in sources:
            named_weights = read_mapping(sources[naming_file]).get("weights_sha256")
        if named_weights != weights:
            sources = {name: path for name, path in sources.items() if not _matches(name, patterns)}
    return sources


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of a run for an upload: without paths on this machine, and weights as a hard link if that can be."""
    if source.suffix in (".json", ".yaml"):
        content = source.read_bytes()
        recorded = parse_mapping(content, source)
        public = _without_local_paths(recorded)
        if public == recorded:
            target.write_bytes(content)
        elif source.suffix == ".json":
            target.write_text(json.dumps(public, indent=2), encoding="utf-8")
        else:
            target.write_text(yaml.safe_dump(public, sort_keys=False), encoding="utf-8")
        return
    if source.suffix == ".safetensors":  # weights are replaced and never written into, so that a link keeps them
        with suppress(OSError):
            os.link(source.resolve(), target)  # the Hub's cache consists of symbolic links
            return
    shutil.copyfile(source, target)


def _without_local_paths(value: Any) -> Any:
    """Replace paths by their last component, so that nothing about this machine is uploaded."""
    if isinstance(value, dict):
        return {key: _without_local_paths(item) for key, item in value.items() if key not in LOCAL_SETTINGS}
    if isinstance(value, list):
        return [_without_local_paths(item) for item in value]
    if isinstance(value, str) and is_local_path(value):
        return Path(value).name
    return value


def is_local_path(text: str) -> bool:
    """Return whether a text is written as a path on this machine, and as nothing else."""
    return Path(text).is_absolute() or text.startswith(("~", "."))


def _check_publishable(folder: Path) -> None:
    """Raise UsageError unless a folder holds a model that stock diffusers loads, and no token."""
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"the folder must hold a saved model, got {str(folder)!r} without model_index.json")
    if not any(name.endswith(".safetensors") for name in _uploaded_names(folder)):
        raise UsageError(f"the folder must hold weights as safetensors, got {str(folder)!r} without")
    for name, component in read_mapping(folder / "model_index.json").items():
        if isinstance(component, list) and str(component[0]).split(".")[0] == "hf_ddpm":
            raise UsageError(
                f"model_index.json must name classes of diffusers, got a {name} of {component[0]}, which diffusers "
                "does not load: save the model with hf_ddpm.DDPMPipeline"
            )
    if read_mapping(folder / "config.yaml").get("hub_token"):
        raise UsageError(f"hub_token must not be published, but is set in {folder / 'config.yaml'}: delete that line")


def _uploaded_names(folder: Path) -> list[str]:
    """Return the names of the files that are uploaded.

    Only the folders in UPLOADED are listed: others, such as checkpoints, may vanish while they are listed.
    """
    paths = {path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _averages(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("ema/*/model_index.json"))


def commit(
    api: HfApi,
    files: Path,
    name: str,
    revision: str,
    message: str,
    still_wanted: Callable[[], bool] = lambda: True,
) -> Pushed:
    """Commit what `copy_for_upload` copied to a branch, and leave the README of the commit in `files`.

    Args:
        api: The client.
        files: The folder of the copies.
        name: The repository, with its namespace.
        revision: The branch, which is created from `main` if need be.
        message: The commit's message.
        still_wanted: Asked just before the commit is made, which may be long after the upload began. No commit is
            made if it returns False.

    Raises:
        PushError: When the Hub refuses, or cannot be reached, or the commit is not wanted any more.
    """
    with as_push_errors(api, name):
        if revision != "main":
            api.create_branch(name, branch=revision, exist_ok=True)
        for _ in range(MAX_ATTEMPTS - 1):
            try:
                return _commit_onto_head(api, files, name, revision, message, still_wanted)
            except HfHubHTTPError as error:
                if status_of(error) != 412:  # 412: somebody else committed in between
                    raise
        return _commit_onto_head(api, files, name, revision, message, still_wanted)


def _commit_onto_head(
    api: HfApi, files: Path, name: str, revision: str, message: str, still_wanted: Callable[[], bool]
) -> Pushed:
    head = str(api.model_info(name, revision=revision).sha)
    names_on_hub = api.list_repo_files(name, revision=head)
    readme, keeps_their_text = _next_readme(api, files, name, revision, head if "README.md" in names_on_hub else None)
    names = [file for file in _uploaded_names(files) if file != "README.md"]
    operations: list[Any] = [CommitOperationAdd(file, files / file) for file in names]
    operations.append(CommitOperationAdd("README.md", readme.encode()))
    for operation in operations:
        is_weights = Path(operation.path_in_repo).suffix in (".safetensors", ".npz")
        if is_weights or operation.path_in_repo.startswith("figures/"):
            # One by one: for several, the client starts threads, and Python waits for threads before it ends.
            api.preupload_lfs_files(name, [operation], revision=revision)
    outdated = [file for file in names_on_hub if file not in names and _matches(file, REPLACED)]
    operations += [CommitOperationDelete(file) for file in outdated]
    if not still_wanted():
        raise PushError("a newer state goes in its place")
    made = api.create_commit(name, operations, commit_message=message, revision=revision, parent_commit=head)
    write_atomically(files / "README.md", readme)
    return Pushed(name, made.repo_url.url, made.oid, made.oid != head, keeps_their_text)


def _next_readme(api: HfApi, files: Path, name: str, revision: str, head: str | None) -> tuple[str, bool]:
    """Return the README of the next commit, and whether it keeps a text of the Hub in the place of another text here.

    Args:
        head: The commit that has the README on the Hub, or None if there is no README.
    """
    our_readme = write_card(files, name, _branch_on_card(revision)).read_text("utf-8")
    if head is None:
        return our_readme, False
    path = Path(api.hf_hub_download(name, "README.md", revision=head))
    no_texts = {"", f"# {name.split('/')[-1]}"}  # a title is not a text
    try:
        hub_readme = path.read_text("utf-8")
        our_text, hub_text = author_text(our_readme), author_text(hub_readme)
        is_only_title = "\n" not in hub_text and our_text.startswith(hub_text)
        if hub_text in no_texts or is_only_title:
            card: Any = ModelCard(hub_readme, ignore_metadata_errors=True)
            card.text = ModelCard(our_readme).text
            return merge_readme(str(card), our_readme), False
        return merge_readme(hub_readme, our_readme), our_text not in no_texts and our_text not in hub_text
    except (ValueError, yaml.YAMLError) as error:
        raise PushError(
            f"README.md of {name} cannot be read: {in_one_line(error)}: correct it on the Hub, or delete it there",
            is_transient=False,
        ) from error


def _read_text(path: Path) -> str | None:
    return path.read_text("utf-8", errors="replace") if path.is_file() else None


def _branch_on_card(revision: str) -> str | None:
    """Return the branch as a card names it: `main` is not named."""
    return None if revision == "main" else revision
