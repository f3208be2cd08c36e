"""The real client takes the Hub of the tests for the Hub."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.hub_server import GIT_ATTRIBUTES, HubServer, run_client

ALICE, BOB, READER = "hf_alice", "hf_bob", "hf_reader"

PRELUDE = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
api = HfApi()
said = []

def error(function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except Exception as error:
        name = type(error).__name__.removeprefix("Remote")  # which versions before 1 do not have
        return [name, getattr(getattr(error, "response", None), "status_code", None)]
"""


@pytest.fixture
def hub():
    with HubServer(tokens={ALICE: "alice", BOB: "bob", READER: "alice"}, read_only=[READER]) as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """A function: code of which PRELUDE is part, token -> what the code has put into `said`."""

    def run(code: str, token: str | None = ALICE):
        said = run_client(hub, PRELUDE + dedent(code) + "\nprint(json.dumps(said))", tmp_path, token)
        return json.loads(said.splitlines()[-1])

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "run"
    files = {"README.md": b"# Digits\n", "model.safetensors": bytes(range(256)), "unet/config.json": b"{}\n"}
    for name, content in {**files, "metrics.jsonl": b"{}\n" * 5000, "figures/empty.png": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".cache")}


@pytest.mark.slow
def test_upload_makes_one_commit_or_none_if_nothing_changed(hub, client, folder):
    said = client("""
        address = api.create_repo("alice/digits", private=True)
        first = api.upload_folder(repo_id="alice/digits", folder_path="run", commit_message="first")
        again = api.upload_folder(repo_id="alice/digits", folder_path="run", commit_message="again")
        open("run/model.safetensors", "ab").write(b"more")
        changed = api.upload_folder(repo_id="alice/digits", folder_path="run", commit_message="changed")
        operations = [CommitOperationDelete("figures/"), CommitOperationDelete("README.md")]
        api.create_commit("alice/digits", operations, commit_message="fewer")
        said = [str(address), first.oid, again.oid, changed.oid]
    """)
    repo = hub.repo("alice/digits")
    start, first, changed, fewer = repo.commits
    assert said == [f"{hub.url}/alice/digits", first.oid, first.oid, changed.oid]
    assert [commit.title for commit in repo.commits[1:]] == ["first", "changed", "fewer"]
    assert [commit.parent for commit in repo.commits] == [None, start.oid, first.oid, changed.oid]
    expected = {**files_of(folder), ".gitattributes": GIT_ATTRIBUTES}
    assert changed.files == expected
    assert first.files == {**expected, "model.safetensors": bytes(range(256))}
    assert first.lfs == changed.lfs == {"model.safetensors", "metrics.jsonl"}
    assert repo.files.keys() == expected.keys() - {"README.md", "figures/empty.png"}
    assert fewer.lfs == changed.lfs
    uploads = hub.requests_to("PUT", "^/lfs/")
    assert len(uploads) == 3
    assert all("authorization" not in request.headers for request in uploads)
    assert {request.user for request in hub.requests_to("POST", "^/api/")} == {"alice"}
    assert all("hf_hub" in request.user_agent for request in hub.requests_to("POST", "^/api/"))


@pytest.mark.slow
@pytest.mark.parametrize(("type", "prefix"), [("model", ""), ("dataset", "datasets/"), ("space", "spaces/")])
def test_downloads_return_what_was_uploaded(hub, client, folder, tmp_path, type, prefix):
    said = client(f"""
        repo = dict(repo_id="alice/digits", repo_type="{type}")
        address = api.create_repo(**repo, space_sdk="static" if "{type}" == "space" else None)
        first = api.upload_folder(**repo, folder_path="run").oid
        api.create_branch(**repo, branch="try/1")
        api.create_tag(**repo, tag="v1", revision="try/1")
        api.upload_file(**repo, path_or_fileobj=b"tried", path_in_repo="README.md", revision="try/1")
        snapshot_download(**repo, revision="v1", local_dir="got")
        snapshot_download(**repo, revision="try/1", local_dir="tried")
        info = api.repo_info(**repo, files_metadata=True)
        refs = api.list_repo_refs(**repo)
        assert first == info.sha == refs.tags[0].target_commit
        found = [(file.rfilename, file.size, file.blob_id, file.lfs and file.lfs.sha256) for file in info.siblings]
        tree = list(api.list_repo_tree(**repo, recursive=True))
        listed = [(file.path, file.size, file.blob_id, file.lfs and file.lfs.sha256)
                  for file in tree if hasattr(file, "blob_id")]
        assert sorted(found) == listed and len(listed) == 6
        at_top = sorted(entry.path for entry in tree if "/" not in entry.path)
        assert sorted(entry.path for entry in api.list_repo_tree(**repo)) == at_top
        assert [file.path for file in api.list_repo_tree(**repo, path_in_repo="unet")] == ["unet/config.json"]
        paths = api.get_paths_info(**repo, paths=["unet", "README.md", "none"])
        exists = [api.file_exists(**repo, filename=name) for name in ("unet/config.json", "none")]
        titles = [commit.title for commit in api.list_repo_commits(**repo, revision="try/1")]
        said = [str(address), info.private, [branch.name for branch in refs.branches],
                [entry.path for entry in paths], exists, len(titles), api.whoami()["name"],
                error(api.repo_info, **repo, revision="none"), error(api.hf_hub_download, **repo, filename="none")]
        api.delete_branch(**repo, branch="try/1")
        api.delete_tag(**repo, tag="v1")
    """)
    branches, paths = ["main", "try/1"], ["unet", "README.md"]
    assert said[:7] == [f"{hub.url}/{prefix}alice/digits", False, branches, paths, [True, False], 3, "alice"]
    assert said[7:] == [["RevisionNotFoundError", 404], ["EntryNotFoundError", 404]]
    expected = {**files_of(folder), ".gitattributes": GIT_ATTRIBUTES}
    assert files_of(tmp_path / "got") == expected
    assert files_of(tmp_path / "tried") == {**expected, "README.md": b"tried"}
    assert hub.repo("alice/digits", type).branches.keys() == {"main"}
    assert not hub.repo("alice/digits", type).tags


@pytest.mark.slow
def test_users_see_and_write_only_what_the_owner_allows(hub, client):
    said = client(
        f"""
        api.create_repo("alice/digits", private=True, token="{ALICE}")
        for private in (True, False):
            for token in (False, "hf_unknown", "{BOB}", "{READER}"):
                said.append(error(api.model_info, "alice/digits", token=token))
                said.append(error(
                    api.upload_file, repo_id="alice/digits", path_or_fileobj=b"", path_in_repo="a", token=token))
            api.update_repo_settings("alice/digits", private=False, token="{ALICE}")
        said.append(error(api.create_repo, "alice/more", token="{READER}"))
        said.append(error(api.create_repo, "alice/more", token="{BOB}"))
        said.append(error(api.delete_repo, "alice/digits", token="{BOB}"))
        api.create_repo("more", token="{BOB}")
        api.delete_repo("bob/more", token="{BOB}")
        said.append(error(api.delete_repo, "bob/more", token="{BOB}"))
        said.append(error(api.whoami, token="hf_unknown")[1])
        """,
        token=None,
    )
    unknown, refused = ["HfHubHTTPError", 401], ["HfHubHTTPError", 403]
    anonymous, other = ["RepositoryNotFoundError", 401], ["RepositoryNotFoundError", 404]
    private = [anonymous, anonymous, unknown, unknown, other, other, None, refused]
    public = [None, anonymous, unknown, unknown, None, refused, None, refused]
    assert said == [*private, *public, refused, refused, refused, other, 401]
    assert len(hub.repo("alice/digits").commits) == 1
    assert not hub.repo("alice/digits").private


@pytest.mark.slow
def test_conflicting_commits_are_refused_and_change_nothing(hub, client):
    said = client("""
        address = api.create_repo("alice/digits")
        assert api.create_repo("alice/digits", exist_ok=True) == address
        assert api.model_info("alice/digits").private is False
        start = api.model_info("alice/digits").sha
        add = lambda: [CommitOperationAdd("a", b"a")]
        send = dict(repo_id="alice/digits", commit_message="a", parent_commit=start)
        api.create_commit(operations=add(), **send)
        said = [error(api.create_repo, "alice/digits"), error(api.create_repo, "alice/digits", private=True),
                error(api.create_commit, operations=[CommitOperationAdd("b", b"b")], **send),
                error(api.create_branch, "alice/digits", branch="main"),
                error(api.create_commit, "alice/digits", [CommitOperationDelete("none")], commit_message="none"),
                error(api.hf_hub_download, "alice/digits", "none"),
                error(api.upload_file, repo_id="alice/digits", path_or_fileobj=b"", path_in_repo="b", revision="x")]
        api.create_tag("alice/digits", tag="v1")
        said.append(error(api.create_tag, "alice/digits", tag="v1"))
    """)
    assert said == [
        *[["HfHubHTTPError", 409]] * 2,
        ["HfHubHTTPError", 412],
        ["HfHubHTTPError", 409],
        *[["EntryNotFoundError", 404]] * 2,
        ["RevisionNotFoundError", 404],
        ["HfHubHTTPError", 409],
    ]
    assert hub.repo("alice/digits").files.keys() == {".gitattributes", "a"}


@pytest.mark.slow
def test_commit_refuses_a_large_file_that_was_not_uploaded(hub, client):
    """As when the upload was taken for granted: the client is made to believe that the objects are there."""
    hub.fail(200, r"objects/batch$", body=json.dumps({"objects": []}))
    said = client("""
        api.create_repo("alice/digits")
        upload = dict(repo_id="alice/digits", path_or_fileobj=b"abc", path_in_repo="a.bin")
        said = [error(api.upload_file, **upload), error(api.upload_file, **upload)]
    """)
    assert said == [["BadRequestError", 400], None]
    assert len(hub.repo("alice/digits").commits) == 2


@pytest.mark.slow
def test_cut_breaks_a_connection_at_the_given_byte(hub, client, tmp_path):
    content = bytes(range(256)) * (12 << 12)  # more than the client's block of 10 MiB, which it keeps
    (tmp_path / "large.bin").write_bytes(content)
    hub.cut("^/lfs/", after_bytes=1000)
    hub.cut("/resolve/.*/large.bin", after_bytes=11 << 20, method="GET")
    hub.cut("/resolve/.*/small.bin", after_bytes=2, method="GET", reset=True)
    hub.cut("/commit/lost")
    said = client("""
        api.create_repo("alice/digits")
        upload = dict(repo_id="alice/digits", path_in_repo="small.bin", path_or_fileobj=b"small")
        api.upload_file(**{**upload, "path_in_repo": "large.bin", "path_or_fileobj": "large.bin"})
        api.upload_file(**upload)
        download = dict(repo_id="alice/digits", local_dir="got")
        error(snapshot_download, **download, allow_patterns="large.bin")  # goes on by itself from version 1 on
        said.append(error(snapshot_download, **download, allow_patterns="small.bin"))
        snapshot_download(**download)
        api.create_branch("alice/digits", branch="lost")
        said.append(error(api.upload_file, **{**upload, "path_or_fileobj": b"other", "revision": "lost"}))
    """)
    assert all(kind is not None for kind in said)
    assert files_of(tmp_path / "got") == {
        "large.bin": content,
        "small.bin": b"small",
        ".gitattributes": GIT_ATTRIBUTES,
    }
    assert [request.status for request in hub.requests_to("PUT", "^/lfs/")] == [None, 200, 200, 200]
    first, second = hub.requests_to("GET", "/large.bin$")
    assert ("range" in first.headers, first.status) == (False, 200)
    assert (second.headers["range"], second.status) == ("bytes=10485760-", 206)
    lost = hub.repo("alice/digits").commit("lost")  # done, though the client does not know
    assert lost.files["small.bin"] == b"other"


@pytest.mark.slow
def test_fail_answers_with_an_error_the_given_number_of_times(hub, client):
    statuses = [400, 401, 403, 409, 412, 500, 503]
    for status in statuses:
        hub.fail(status, "/commit/main$", method="POST")
    hub.fail(503, "^/lfs/", headers={"Retry-After": "0"})
    hub.fail(404, "alice/digits$", headers={"X-Error-Code": "RepoNotFound"}, times=None)
    said = client(f"""
        api.create_repo("alice/digits")
        for _ in range({len(statuses) + 1}):
            operations = [CommitOperationAdd("a.bin", b"a")]
            said.append(error(api.create_commit, "alice/digits", operations, commit_message="a"))
        said += [error(api.model_info, "alice/digits"), error(api.model_info, "alice/digits")]
    """)
    assert [kind and kind[1] for kind in said] == [*statuses, None, 404, 404]
    assert [request.status for request in hub.requests_to("PUT", "^/lfs/")] == [503, 200]
    assert len(hub.repo("alice/digits").commits) == 2
    hub.mend()
    assert client('said = api.model_info("alice/digits").id') == "alice/digits"


@pytest.mark.slow
def test_hold_keeps_a_request_until_it_is_released(hub, client):
    hold = hub.hold("/commit/")
    with ThreadPoolExecutor() as pool:
        upload = pool.submit(
            client,
            """
            api.create_repo("alice/digits")
            api.upload_file(repo_id="alice/digits", path_or_fileobj=b"a", path_in_repo="a")
            """,
        )
        assert hold.entered.wait(60)
        assert len(hub.repo("alice/digits").commits) == 1
        assert not upload.done()
        hold.release()
        upload.result()
    assert hub.repo("alice/digits").files["a"] == b"a"


@pytest.mark.slow
def test_no_thread_survives_the_server(tmp_path):
    before = set(threading.enumerate())
    with ThreadPoolExecutor() as pool:
        with HubServer() as hub:
            hold = hub.hold()
            held = pool.submit(run_client, hub, "import huggingface_hub; huggingface_hub.model_info('a/b')", tmp_path)
            assert hold.entered.wait(60)
        with pytest.raises(AssertionError, match="Error"):
            held.result()
    assert set(threading.enumerate()) <= before
