"""The named settings that ship with the package: NAME.yaml, and NAME.json for a network of its own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def settings(name: str) -> str:
    """Return the YAML text of the recipe `name`."""
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def model_config(name: str) -> Path | None:
    """Return the path of the UNet2DModel config that ships with the recipe `name`, or None if it has none."""
    path = _folder() / f"{name}.json"
    return path if path.is_file() else None


def _folder() -> Path:
    return Path(str(resources.files("hf_ddpm.recipes")))
