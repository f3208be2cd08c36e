"""Decode a folder of pictures that nobody prepared: each is decoded, or refused by name and reason.

    python -m benchmarks.decoding.run FOLDER NAME

Each picture is decoded as training decodes it, at 64 x 64 pixels and 3 channels. What is refused is counted by reason;
any error but those that name a picture ends the script. Writes `table.md`. The row of openclipart is of Debian's
package openclipart-png: `apt-get download openclipart-png`, `dpkg -x openclipart-png_*.deb FOLDER`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import decode, unreadable_image_error
from hf_ddpm.data.image_folder import list_images
from hf_ddpm.data.image_format import ImageFormat
from hf_ddpm.runtime.errors import UsageError

HEAD = """# Pictures that nobody prepared

Decoded to 64 x 64 pixels and 3 channels by `python -m benchmarks.decoding.run FOLDER NAME`, with Pillow {pillow}.

| pictures | found | decoded | refused by name | milliseconds each, one thread |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="what the table calls the pictures")
    options = parser.parse_args()
    listed = list_images(options.folder)
    image_format = ImageFormat(DataConfig(resolution=64, channels=3, center_crop=True), (64, 64), 3, 255)
    refused: Counter[str] = Counter()
    losses: Counter[str] = Counter()
    started = time.perf_counter()
    for path in tqdm(listed.images, unit="picture"):
        try:
            decoded = decode({"bytes": None, "path": str(path)}, path.name, image_format)
            assert decoded.planes.shape == (3, 64, 64)
            losses.update(decoded.losses)
        except UsageError as error:
            refused[_reason(str(error), path)] += 1
        except Exception as error:  # what the cache makes into a message, too
            refused[_reason(str(unreadable_image_error(path.name, error, image_format.config)), path)] += 1
    seconds = time.perf_counter() - started
    found, count = len(listed.images), sum(refused.values())
    assert found > 0
    row = f"| {options.name} | {found:,} | {found - count:,} | {count:,} | {1000 * seconds / found:.1f} |\n"
    notes = [f"- refused, {n:,} of {options.name}: {reason}" for reason, n in refused.most_common()]
    notes += [f"- decoded without {loss}: {n:,} of {options.name}" for loss, n in losses.most_common()]
    notes += [f"- not opened, {n:,} of {options.name}: {kind}" for kind, n in sorted(listed.unread.items())]
    table = HEAD.format(pillow=version("pillow")) + row + "\n" + "\n".join(notes) + ("\n" if notes else "")
    Path(__file__).with_name("table.md").write_text(table)
    print(table)


def _reason(message: str, path: Path) -> str:
    assert path.name in message
    return re.sub(r"\d+", "N", message.replace(path.name, "NAME").replace(str(path.parent), "FOLDER"))


if __name__ == "__main__":
    main()
