"""The files around the package say what is true: the contributors' map, the commands of CI, the versions of Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_ddpm import __version__

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CI_RUN = (ROOT / ".ci/run").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
PRE_COMMIT = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))


def paths_in_map() -> set[str]:
    """The files and folders in the tree of CONTRIBUTING.md, relative to the repository."""
    tree = re.search(r"```\n(hf_ddpm/\n.*?)```", CONTRIBUTING, re.DOTALL)
    assert tree is not None
    paths, parents = set(), []
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        name = line.split()[0]
        parents[depth:] = [name.rstrip("/")]
        paths.add("/".join(parents))
    return paths


def test_map_names_every_module_and_no_other():
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_ddpm").rglob("*.py")}
    modules = {name for name in modules if not re.search(r"\w+/__init__\.py$|space_app/", name)} | {
        "hf_ddpm/__init__.py"
    }
    in_map = paths_in_map()
    assert {name for name in in_map if name.endswith(".py")} == modules
    assert not [name for name in in_map if not (ROOT / name).exists()]


def test_places_in_contributing_exist():
    """Each "`path`: `name`", and each path alone."""
    paths = re.findall(r"`((?:hf_ddpm|tests|model_card|launch_configs|benchmarks)/[\w/.]*)`", CONTRIBUTING)
    assert paths
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    places = re.findall(r"`(hf_ddpm/[\w/]+\.py)`: `(\w+)`", CONTRIBUTING)
    assert len(places) >= 6
    for path, name in places:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE), (path, name)


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install -e ".[dev]" && python -m pytest' in readme
    assert '-e ".[dev]"' in CI_RUN
    assert "python -m pytest" in CI_RUN


def test_ci_builds_the_documentation_with_warnings_as_errors():
    assert "\nsphinx-build -q -W -b html docs docs/_build\n" in CI_RUN
    assert "`sphinx-build -W -b html docs docs/_build`" in CONTRIBUTING


@pytest.mark.parametrize("hook", ["ruff-check", "ruff-format", "codespell", "lint-imports", "basedpyright"])
def test_pre_commit_and_ci_run_the_same_commands(hook):
    entries = {entry["id"]: entry["entry"] for repo in PRE_COMMIT["repos"] for entry in repo["hooks"]}
    assert f"\n{entries[hook]}\n" in CI_RUN


def test_pre_commit_needs_no_network():
    assert {repo["repo"] for repo in PRE_COMMIT["repos"]} == {"local"}
    assert {hook["language"] for repo in PRE_COMMIT["repos"] for hook in repo["hooks"]} == {"system", "pygrep"}


def test_workflow_calls_ci_run_and_every_job_has_a_timeout():
    assert {"run": ".ci/run"} in WORKFLOW["jobs"]["check"]["steps"]
    assert all("timeout-minutes" in job for job in WORKFLOW["jobs"].values())


def test_every_declared_python_is_tested_by_the_workflow():
    classifiers = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    matrix = [row["python"] for row in WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]]
    checked = [
        s["with"]["python-version"]
        for s in WORKFLOW["jobs"]["check"]["steps"]
        if "python-version" in s.get("with", {})
    ]
    assert sorted([*matrix, *checked]) == sorted(classifiers)
    assert f"Python {classifiers[0]} to {classifiers[-1]}" in CONTRIBUTING


def test_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__


def test_script_says_what_a_job_of_the_hub_needs():
    """The header of PEP 723, found as the PEP says, with the table that `hf jobs uv run` reads."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    script = (ROOT / "train_accelerate.py").read_text(encoding="utf-8")
    (block,) = re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script)
    header = tomllib.loads("".join(re.sub(r"(?m)^# ?", "", block["content"])))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert block["type"] == "script"
    assert header["requires-python"] == project["requires-python"]
    assert header["dependencies"] == [project["name"]]
    assert header["tool"]["hf-jobs"] == {"flavor": "t4-small", "timeout": "2h", "secrets": ["HF_TOKEN"]}


@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
def test_large_files_are_refused(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(2**20 + 1))
    script = str(ROOT / ".ci/check-file-sizes")
    assert subprocess.run([script, str(small)], check=False).returncode == 0
    done = subprocess.run([script, str(small), str(large)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert str(large) in done.stdout
    assert str(small) not in done.stdout
