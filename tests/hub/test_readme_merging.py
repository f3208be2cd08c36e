"""A README keeps what its author wrote around our card, here and on the Hub."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.readme import BEGIN, END, author_text
from hf_ddpm.hub.upload import KEPT_README, push
from hf_ddpm.runtime.errors import PushError, UsageError
from tests.support.cards import CONFIG, HAND_WRITTEN, RESULT, make_run, write_results
from tests.support.hub_runs import NAME, UPLOAD_WARNING, edit_on_hub
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


def test_write_card_keeps_all_of_a_readme_written_by_hand(tmp_path: Path):
    make_run(tmp_path)
    (tmp_path / "README.md").write_text(HAND_WRITTEN, encoding="utf-8")
    for _ in range(2):  # the second time our part is replaced
        found = ModelCard.load(write_card(tmp_path))
        assert found.text.startswith(HAND_WRITTEN.partition("---\n\n")[2], 1)
        assert found.text.count(BEGIN) == found.text.count(END) == 1
        assert "## How to use it" in found.text
        assert found.data.license == "mit"
        assert found.data.tags[0] == "mine"
        assert "hf_ddpm" in found.data.tags
        assert [r.metric_value for r in found.data.eval_results] == [3.17]
        assert author_text(str(found)) == "# Clothes\n\nI made this on a rainy day."


def test_write_card_keeps_the_text_around_the_card(tmp_path: Path):
    path = write_card(make_run(tmp_path))
    text = path.read_text(encoding="utf-8").replace(BEGIN, f"Above.\n{BEGIN}") + "\nBelow.\n"
    path.write_text(text.replace("## How to use it", "## Something old"), encoding="utf-8")
    write_card(tmp_path)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.slow
@pytest.mark.parametrize("lost", [BEGIN, END])
def test_write_card_restores_a_deleted_mark_without_growing(tmp_path: Path, lost: str):
    path = write_card(make_run(tmp_path))
    path.write_text(path.read_text(encoding="utf-8").replace(lost, ""), encoding="utf-8")
    lengths = [len(write_card(tmp_path).read_text(encoding="utf-8")) for _ in range(3)]
    assert lengths[1] == lengths[0] == lengths[2]
    assert path.read_text(encoding="utf-8").count(lost) == 1


def test_write_card_replaces_the_base_model_in_the_metadata(tmp_path: Path):
    make_run(tmp_path, config=CONFIG | {"init_from": "me/base"})
    (tmp_path / "README.md").write_text(HAND_WRITTEN.replace("tags:", "base_model: other/base\ntags:"), "utf-8")
    assert ModelCard.load(write_card(tmp_path)).data.base_model == "me/base"


def test_write_card_replaces_our_results_and_keeps_others(tmp_path: Path):
    make_run(tmp_path)
    (tmp_path / "README.md").write_text(HAND_WRITTEN, encoding="utf-8")
    write_results(tmp_path, RESULT)
    write_card(tmp_path)
    write_results(tmp_path, RESULT | {"value": 0.5})
    found = ModelCard.load(write_card(tmp_path)).data
    assert [r.metric_value for r in found.eval_results] == [3.17, 0.5]
    assert found.model_name == "theirs"


@pytest.mark.slow
def test_push_keeps_the_text_around_the_card_on_the_hub(server: HubServer, run: Path):
    push(run, NAME)
    text = server.repo(NAME).files["README.md"].decode()
    edited = text.replace("---\n", "---\nlicense: mit\n", 1).replace(BEGIN, f"Above.\n\n{BEGIN}")
    edit_on_hub(NAME, edited.replace("## How to use it", "## Replaced") + "\nBelow.\n")
    assert not push(run, NAME).kept_readme
    there = server.repo(NAME).files["README.md"].decode()
    assert author_text(there).split() == ["#", "digits", "Above.", "Below."]
    assert (ModelCard(there).data.license, "## How to use it" in there, "Replaced" in there) == ("mit", True, False)
    assert (run / "README.md").read_text() == there
    assert not push(run, NAME).is_new


@pytest.mark.parametrize("metadata", ["", "---\nlicense: mit\n---\n"])
def test_push_keeps_a_readme_written_by_hand_on_the_hub(server: HubServer, run: Path, metadata: str):
    HfApi().create_repo(NAME, private=True)
    edit_on_hub(NAME, f"{metadata}# Mine\n\nOn a rainy day.\n")
    assert not push(run, NAME).kept_readme
    there = ModelCard(server.repo(NAME).files["README.md"].decode())
    assert author_text(str(there)) == "# Mine\n\nOn a rainy day."
    assert there.data.license == ("mit" if metadata else None)
    assert there.text.count(BEGIN) == 1


def test_push_keeps_metadata_of_the_hub_beside_a_local_text(server: HubServer, run: Path):
    HfApi().create_repo(NAME, private=True)
    edit_on_hub(NAME, "---\nlicense: mit\n---\n# digits\n")
    (run / "README.md").write_text(f"{(run / 'README.md').read_text()}\nFrom here.\n")
    assert not push(run, NAME).kept_readme
    there = ModelCard(server.repo(NAME).files["README.md"].decode())
    assert there.data.license == "mit"
    assert "hf_ddpm" in there.data.tags
    assert author_text(str(there)).split() == ["#", "digits", "From", "here."]


@pytest.mark.slow
def test_push_uploads_a_local_text_whatever_the_repository_is_called(server: HubServer, run: Path):
    push(run, "other")
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(f"{text}\nFrom here.\n")
    assert not push(run, "other").kept_readme
    assert "From here." in server.repo("alice/other").files["README.md"].decode()
    edit_on_hub("alice/other", text.replace(BEGIN, f"Above.\n{BEGIN}"))
    (run / "README.md").write_text(text)
    assert not push(run, "other").kept_readme
    assert "Above." in (run / "README.md").read_text()


@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\n# Mine\n", b"---\n- a\n---\n# Mine\n", b"\xff# Mine\n"])
def test_push_leaves_an_unreadable_readme_alone(server: HubServer, run: Path, text: bytes):
    HfApi().create_repo(NAME, private=True)
    head = server.repo(NAME).commit()
    server.repo(NAME).add("main", "theirs", "", {**head.files, "README.md": text}, head.lfs)
    with pytest.raises(PushError, match=r"README.md of alice/digits .*correct it on the Hub") as error:
        push(run, NAME)
    assert not error.value.is_transient
    assert server.repo(NAME).files["README.md"] == text
    (run / "README.md").write_bytes(text)
    with pytest.raises(UsageError, match=r"README\.md cannot be read: .*: correct it, or delete it"):
        push(run, "other")
    assert not list(run.glob("partial-*"))


@pytest.mark.slow
def test_push_keeps_each_text_where_it_was_written_if_both_were_edited(server: HubServer, run: Path):
    push(run, NAME)
    text = (run / "README.md").read_text()
    edit_on_hub(NAME, f"{text}\nFrom there.\n")
    (run / "README.md").write_text(f"{text}\nFrom here.\n")
    done = CliRunner().invoke(app, ["push", str(run), NAME])
    assert (done.exit_code, KEPT_README in done.stderr) == (0, True)
    there, here = server.repo(NAME).files["README.md"].decode(), (run / "README.md").read_text()
    assert ("From there." in there, "From here." in there) == (True, False)
    assert ("From there." in here, "From here." in here) == (False, True)
    assert push(run, NAME).kept_readme


def test_push_keeps_what_is_written_into_the_local_readme_meanwhile(server: HubServer, run: Path):
    hold = server.hold("/commit/")
    pushing = threading.Thread(target=push, args=(run, "digits"))
    pushing.start()
    assert hold.entered.wait(60)
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(f"{text}\nWritten meanwhile.\n")
    hold.release()
    pushing.join()
    assert (run / "README.md").read_text().endswith("\nWritten meanwhile.\n")
    assert '"alice/digits"' in (run / "README.md").read_text()
