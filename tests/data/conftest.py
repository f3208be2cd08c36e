"""Fixtures of the tests of data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of `datasets`."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder named `photos`."""
    path = tmp_path / "photos"
    path.mkdir()
    return path
