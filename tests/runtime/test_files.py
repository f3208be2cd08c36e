"""Readers that name what is damaged, and checksums of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, weights_sha256


def test_read_mapping_reads_json_and_yaml(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"x": [1]}')
    (tmp_path / "a.yaml").write_text("x: [1]\n")
    (tmp_path / "empty.yaml").write_text("")
    assert read_mapping(tmp_path / "a.json") == read_mapping(tmp_path / "a.yaml") == {"x": [1]}
    assert read_mapping(tmp_path / "empty.yaml") == read_mapping(tmp_path / "nothing.json") == {}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'{"x":', "Expecting value"),
        ("a.json", b"", "Expecting value"),
        ("a.json", b"[1]", r"it must be a mapping, got \[1\]"),
        ("a.yaml", b"x: [", "while parsing"),
        ("a.yaml", b"\xff", "codec can't decode"),
    ],
)
def test_read_mapping_names_file_problem_and_remedy(tmp_path: Path, name: str, content: bytes, problem: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{name} cannot be read: .*{problem}.*: move it away$"):
        read_mapping(tmp_path / name, "move it away")


def test_naming_damage_names_a_missing_key_and_what_may_not_be_read():
    message = r"^x cannot be read: KeyError: 'y': remove it$"
    with pytest.raises(UsageError, match=message), naming_damage("x cannot be read", "remove it"):
        raise KeyError("y")
    with pytest.raises(UsageError, match=r"^mine$"), naming_damage("x cannot be read", "remove it"):
        raise UsageError("mine")
    with pytest.raises(UsageError, match=r"^x cannot be read: denied"), naming_damage("x cannot be read", "remove it"):
        raise PermissionError("denied")


def test_weights_sha256_is_that_of_the_contents_in_the_order_of_names(tmp_path: Path):
    assert weights_sha256(tmp_path) is None
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"ab")
    (tmp_path / "optimizer.bin").write_bytes(b"x")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"ab").hexdigest()
    (tmp_path / "unet").mkdir()
    for i, part in enumerate((b"c", b"d")):
        (tmp_path / "unet" / f"diffusion_pytorch_model-{i}-of-2.safetensors").write_bytes(part)
    assert weights_sha256(tmp_path) == hashlib.sha256(b"cd").hexdigest()
