"""Which files of a folder are images, and what is said of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ddpm.data.description import describe_unread
from hf_ddpm.data.image_folder import FORMATS, list_images, listed_once, readable_formats
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, noise, save_grays
from tests.support.streams import stream_config

ROOT = Path(__file__).parents[2]
Image.init()
# Of an icon Pillow keeps certain sizes only, and of MSP and XBM two values.
WRITTEN = {
    extension: name for extension, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO") and name in Image.SAVE
}
WRITTEN = {extension: name for extension, name in WRITTEN.items() if name not in ("ICNS", "MSP", "XBM", "BLP", "AVIF")}


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder).images]


@pytest.mark.parametrize("extension", WRITTEN)
def test_image_of_each_format_is_read(folder: Path, extension: str) -> None:
    picture = Image.fromarray(noise(16, 16))
    if WRITTEN[extension] in ("MPO", "QOI"):
        picture = picture.convert("RGB")
    picture.save(folder / f"picture{extension.upper()}", WRITTEN[extension])
    assert names(folder) == [f"picture{extension.upper()}"]
    assert len(load_images(cache_config(folder))) == 1


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "ICO", "PCX", "QOI"])
def test_image_is_known_by_its_first_bytes_where_its_name_tells_nothing(folder: Path, name: str) -> None:
    Image.fromarray(noise(16, 16)).convert("RGB").save(folder / "a", name)
    Image.fromarray(noise(16, 16)).convert("RGB").save(folder / "0.jpg_large", name)
    assert names(folder) == ["0.jpg_large", "a"]
    assert len(load_images(cache_config(folder))) == 2


def test_file_that_only_its_extension_makes_an_image_needs_it(folder: Path) -> None:
    """TGA has no first bytes of its own: much that is no image would pass for one."""
    picture = Image.fromarray(noise(16, 16))
    picture.save(folder / "a.tga")
    picture.save(folder / "a.bin", "TGA")
    assert names(folder) == ["a.tga"]


def test_text_that_begins_like_an_image_is_none(folder: Path) -> None:
    save_grays(folder, 1)
    for name, text in {"bmw": "BMW and others", "notes.md": "Python notes", "p": "P5", "e": "", "z": "\n"}.items():
        (folder / name).write_text(text)
    assert names(folder) == ["000.png"]
    assert list_images(folder).unread == {"without an extension": 4, ".md": 1}


@pytest.mark.parametrize("read", [load_images, open_stream])
def test_images_in_linked_folders_are_read_with_their_class(folder: Path, tmp_path: Path, read) -> None:
    save_grays(folder / "even", 3)
    save_grays(tmp_path / "elsewhere", 6)
    (folder / "odd").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    make = stream_config if read is open_stream else cache_config
    images = read(make(folder, label_column="label"))
    assert images.num_images == 9
    assert images.class_names == ["even", "odd"]


def test_files_that_are_not_read_are_counted(folder: Path) -> None:
    save_grays(folder, 2)
    for name in ("a.heic", "b.HEIC", "c.jxl"):
        (folder / name).write_bytes(b"not decoded here")
    np.save(folder / "d.npy", np.zeros(3))
    (folder / "e.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (folder / ".hidden.png").write_bytes(b"")
    said = describe_unread(cache_config(folder))
    assert said == (
        "not read: 1 .eps, 2 .heic (pip install pillow-heif), 1 .jxl (pip install pillow-jxl-plugin), 1 .npy"
    )
    assert {"HEIF", "JXL", "EPS"}.isdisjoint(readable_formats())


def test_grid_beside_samples_is_no_image_of_the_set(folder: Path) -> None:
    save_grays(folder, 2)
    (folder / "000.png").rename(folder / "grid.png")
    assert len(names(folder)) == 2
    (folder / "samples.json").write_text("{}")
    assert names(folder) == ["001.png"]
    assert "1 grid.png of `hf-ddpm sample`" in describe_unread(cache_config(folder))


def test_images_that_the_metadata_do_not_name_are_counted(folder: Path) -> None:
    save_grays(folder, 6)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"00{i}.png"}) + "\n" for i in range(4)))
    images = load_images(cache_config(folder))
    assert len(images) == 4
    assert describe_unread(cache_config(folder)) == "not read: 2 images that no row of the metadata names"


def test_archive_beside_images_is_not_opened(folder: Path) -> None:
    """It may hold the same images, or annotations, or be broken."""
    save_grays(folder / "even", 2)
    save_grays(folder / "odd", 2)
    (folder / "old.zip").write_bytes(b"PK broken")
    assert len(load_images(cache_config(folder, label_column="label"))) == 4
    assert describe_unread(cache_config(folder)) == "not read: 1 .zip (unpack it)"


def test_folder_without_images_says_what_it_holds(folder: Path) -> None:
    (folder / "photos.zip").write_bytes(b"")
    (folder / "a.heic").write_bytes(b"")
    message = r"nothing below it is one, but 1 \.heic \(pip install pillow-heif\), 1 \.zip \(unpack it\)"
    with pytest.raises(UsageError, match=message):
        load_images(cache_config(folder))


def test_folders_of_a_drive_without_file_numbers_are_all_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_grays(folder / "a", 1)
    save_grays(folder / "b", 1)
    stat = os.stat

    def without_number(path, **options):
        found = list(stat(path, **options))
        found[1] = 0
        return os.stat_result(found)

    monkeypatch.setattr(os, "stat", without_number)
    assert len(names(folder)) == 2


def test_eps_is_not_opened(folder: Path) -> None:
    """Pillow would start Ghostscript."""
    (folder / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(UsageError, match="not an image that Pillow knows"):
        load_images(cache_config(folder))


def test_folder_that_cannot_be_read_is_named() -> None:
    """By another user than root, who may read everything."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        closed = Path(root, "photos", "closed")
        closed.mkdir(parents=True)
        save_grays(closed.parent, 1)
        closed.chmod(0)
        code = (
            "import os, sys\nfrom pathlib import Path\nfrom hf_ddpm.data.image_folder import list_images\n"
            "if os.getuid() == 0: os.setuid(65534)\nlist_images(Path(sys.argv[1]))"
        )
        command = [sys.executable, "-c", code, str(closed.parent)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        closed.chmod(0o755)
    assert f"each folder of images must be readable, got '{closed}': Permission denied; allow it" in done.stderr


def test_folder_is_listed_once_in_a_block(folder: Path) -> None:
    save_grays(folder, 2)
    with listed_once():
        assert len(list_images(folder).images) == 2
        save_grays(folder, 3)
        assert len(list_images(folder).images) == 2
    assert len(list_images(folder).images) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_pipe_is_no_image_and_no_metadata(folder: Path) -> None:
    """To open one would wait for a writer, for ever."""
    save_grays(folder, 1)
    for name in ("a.png", "metadata.csv", "b"):
        os.mkfifo(folder / name)
    assert names(folder) == ["000.png"]
    assert list_images(folder).unread == {"pipes and the like": 3}
    assert len(load_images(cache_config(folder))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux only")
def test_image_whose_name_is_no_text_is_named(folder: Path) -> None:
    save_grays(folder, 1)
    os.link(folder / "000.png", os.fsencode(folder) + b"/\xff.png")
    with pytest.raises(UsageError, match=r"must be UTF-8, got b'.*\\xff.png': rename it"):
        load_images(cache_config(folder))


def test_link_to_itself_is_a_missing_image(folder: Path) -> None:
    save_grays(folder, 1)
    (folder / "a.png").symlink_to(folder / "a.png")
    with pytest.raises(UsageError, match=r"got row 1 .*symbolic links"):
        load_images(cache_config(folder))
    assert load_images(cache_config(folder, on_bad_image="skip")).num_bad == 1


def test_classes_of_unequal_depth_are_named(folder: Path) -> None:
    save_grays(folder / "cat", 1)
    save_grays(folder, 1)
    with pytest.raises(UsageError, match=r"must be equally deep, got '000.png' beside 'cat/000.png'"):
        load_images(cache_config(folder, label_column="label"))
