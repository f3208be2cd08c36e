"""Make pairs of the emoji of two packages: the drawing of one is the condition, that of the other the image.

    npm pack emoji-datasource-google emoji-datasource-twitter    # unpack both
    python -m benchmarks.super_resolution.emoji google/package/img/google/64 twitter/package/img/twitter/64 pairs

Files of one name are a pair. Transparent pixels become white. Each fifth pair is of the split `test`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from PIL import Image


def main() -> None:
    """Pair the files, and save two splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("conditions", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    names = sorted(
        {each.name for each in options.images.glob("*.png")} & {e.name for e in options.conditions.iterdir()}
    )
    columns = {
        "image": [on_white(options.images / name) for name in names],
        "condition": [on_white(options.conditions / name) for name in names],
    }
    pairs = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    pairs = pairs.cast_column("condition", datasets.Image())
    train = pairs.select([i for i in range(len(pairs)) if i % 5])
    test = pairs.select(range(0, len(pairs), 5))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(options.out))
    print(f"{len(train):,} pairs to train on and {len(test):,} others are in {options.out}")


def on_white(path: Path) -> Image.Image:
    """Return an image whose transparent pixels are white."""
    image = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


if __name__ == "__main__":
    main()
