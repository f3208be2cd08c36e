"""The benchmarks are not run by the tests, but they must import, and their index must name what exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FOLDERS = sorted(path.name for path in BENCHMARKS.iterdir() if path.is_dir() and path.name != "__pycache__")
INDEX = (BENCHMARKS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FOLDERS)
def test_benchmark_script_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    if name == "demo_page":
        pytest.importorskip("playwright", reason="playwright is in the extra dev, not in test")
    module = importlib.import_module(f"benchmarks.{name}.run")
    assert module.__doc__ is not None
    assert f"python -m benchmarks.{name}.run" in module.__doc__
    assert callable(module.main)


def test_benchmark_index_names_every_folder_once():
    assert sorted(re.findall(r"`python -m benchmarks\.(\w+)\.run", INDEX)) == FOLDERS


def test_benchmark_index_links_exist():
    links = re.findall(r"\]\(([^)]+)\)", INDEX)
    assert links
    assert not [link for link in links if not (BENCHMARKS / link).exists()]


def test_benchmark_index_says_answer_command_machine_and_date():
    _, _, *rows = [line.strip("| ").split(" | ") for line in INDEX.splitlines() if line.startswith("|")]
    for question, answer, command, machine, date in rows:
        assert "? [" in question
        assert answer.endswith(".")
        assert command.startswith("`python -m benchmarks.")
        assert machine
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", date)


def test_every_picture_of_a_benchmark_is_shown_on_a_page():
    pages = [ROOT / "README.md", BENCHMARKS / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    pictures = [path for path in BENCHMARKS.rglob("*") if path.suffix in (".png", ".gif")]
    assert pictures
    assert not [path for path in pictures if f"{path.parent.name}/{path.name}" not in text]
