"""The package as a whole: which module may know which, what an import costs, what is declared."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_ddpm"

# Package -> the only modules that may import it.
ONLY_IN = {
    "accelerate": {"training", "runtime"},  # runtime reads the file of `accelerate config`
    "datasets": {"data", "evaluation"},
    "gradio": {"hub"},
    "tensorboard": {"training"},
    "trackio": {"training"},
    "transformers": {"evaluation"},  # for feature networks
    "typer": {"cli", "commands", "runtime"},
}
DISTRIBUTION_OF = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}

SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted(ROOT.glob("train_accelerate.py"))]


def unit(path: Path) -> str:
    """The room of a source file, or its own name at the top."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere in a file, in functions too, but not for type checkers only."""
    package = ".".join(path.parent.relative_to(ROOT).parts)

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return visit(ast.parse(path.read_text(encoding="utf-8")))


def third_party(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - {"hf_ddpm", "train_accelerate"} - sys.stdlib_module_names


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_only_where_needed(path: Path):
    forbidden = {package for package, modules in ONLY_IN.items() if unit(path) not in modules}
    assert not third_party(path) & forbidden


def test_imports_sees_lazy_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "hf_ddpm").mkdir()
    source = tmp_path / "hf_ddpm" / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch.nn\n"
        "from . import hub\n"
        "from .data import Dataset\n"
        "if TYPE_CHECKING:\n    import accelerate\nelse:\n    import numpy\n"
        "def f():\n    from hf_ddpm import DDPMPipeline, __version__\n"
    )
    assert list(imports(source)) == [
        "typing.TYPE_CHECKING",
        "torch.nn",
        "hf_ddpm.hub",
        "hf_ddpm.data.Dataset",
        "numpy",
        "hf_ddpm.DDPMPipeline",
        "hf_ddpm.__version__",
    ]


HEAVY = "{'torch', 'diffusers', 'accelerate', 'datasets', 'transformers', 'huggingface_hub', 'numpy'}"


def test_import_of_the_package_loads_nothing_heavy():
    assert run_python(f"import hf_ddpm, sys; print({HEAVY} & sys.modules.keys() or 'none')") == "none"


@pytest.mark.slow
def test_help_loads_no_torch():
    code = (
        "import contextlib, io, sys; from hf_ddpm.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()): app(['--help'], standalone_mode=False)\n"
        f"print({HEAVY} & sys.modules.keys() or 'none')"
    )
    assert run_python(code) == "none"


def test_no_folder_is_named_like_a_diffusers_pipeline():
    # diffusers would record a class of hf_ddpm/ddpm/x.py in model_index.json as its own `ddpm`.
    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    pipelines = {path.name for path in (Path(spec.origin).parent / "pipelines").iterdir() if path.is_dir()}
    pipelines -= {"__pycache__"}
    assert "ddpm" in pipelines
    folders = {path.parent.name for path in PACKAGE.rglob("*.py")}
    assert "hf_ddpm" in folders
    assert not folders & pipelines


def test_no_module_is_called_utils():
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


@pytest.mark.slow
def test_imports_are_declared_and_minimums_are_tested():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runtime = {(r := Requirement(line)).name.lower(): r for line in project["dependencies"]}
    imported = {DISTRIBUTION_OF.get(name, name) for path in SOURCES for name in third_party(path)}
    extras = project["optional-dependencies"]
    optional = {
        Requirement(line).name.lower()
        for name in ("arrays", "demo", "evaluation", "lpips", "tensorboard", "trackio")
        for line in extras[name]
    }
    assert imported - {name.replace("-", "_") for name in optional} <= runtime.keys()

    declared = runtime | {(r := Requirement(line)).name.lower(): r for line in extras["test"]}
    lines = (ROOT / "tests" / "oldest-requirements.txt").read_text(encoding="utf-8").splitlines()
    oldest = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {r.name.lower(): Version(next(iter(r.specifier)).version) for r in oldest}
    assert {name: Version(next(iter(r.specifier)).version) for name, r in declared.items()} == {
        name: version for name, version in pinned.items() if name in declared
    }


def test_no_path_of_one_machine_is_in_the_repository():
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    machine = [f"/{folder}/".encode() for folder in ("work", "root")]
    files = [ROOT / name for name in listing.split("\0") if name]
    found = [p for p in files if p.is_file() and any(folder in p.read_bytes() for folder in machine)]
    assert not found
