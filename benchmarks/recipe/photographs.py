"""Cut color photographs of 32x32 pixels out of large ones, as a data set that `datasets` loads.

    python -m benchmarks.recipe.photographs OUT PHOTOGRAPH [PHOTOGRAPH ...]

Those of `table.md` are 43 of Debian 12's packages lomiri-wallpapers-16.04, lomiri-wallpapers-20.04 (CC BY-SA 3.0 and
4.0), mate-backgrounds (CC BY-SA 4.0, nature/*.jpg) and plasma-workspace-wallpapers (CC BY-SA 4.0, 2560x1600.jpg), a
few of which are drawn.
Each photograph is scaled so that its short side has between 112 and 192 pixels, and squares of 32 are cut out: 500
from the first seven tenths of the long side for `train`, 100 from the rest for `test`, so that no place is in both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SIDE, SHORT_SIDES, PART = 32, (112, 192), 0.7
NUM_CUTS = {"train": 500, "test": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("photographs", type=Path, nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures: dict[str, list[Image.Image]] = {split: [] for split in NUM_CUTS}
    for path in sorted(options.photographs, key=lambda path: path.name):
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        length = max(photograph.size)
        for split, count in NUM_CUTS.items():
            part = (0, PART * length) if split == "train" else (PART * length, length)
            pictures[split] += [cut(photograph, part, rng) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image()})
    for split, images in pictures.items():
        rng.shuffle(images)
        rows = datasets.Dataset.from_dict({"image": images}, features=features)
        rows.to_parquet(options.out / f"{split}-00000-of-00001.parquet")
        print(split, len(images))


def cut(photograph: Image.Image, part: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """Cut a square out of that part of the longer side, and scale it to SIDE."""
    short = np.exp(rng.uniform(*np.log(SHORT_SIDES)))
    side = SIDE * min(photograph.size) / short
    x, y = rng.uniform(part[0], part[1] - side), rng.uniform(0, min(photograph.size) - side)
    if photograph.height > photograph.width:
        x, y = y, x
    return photograph.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


if __name__ == "__main__":
    main()
