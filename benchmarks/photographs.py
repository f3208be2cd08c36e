"""Color photographs of 32x32 pixels: parts of large photographs, as a data set that `datasets` loads.

    python benchmarks/photographs.py OUT PHOTOGRAPH [PHOTOGRAPH ...]

Those of `recipe.md` are of Debian 12's packages lomiri-wallpapers-16.04, lomiri-wallpapers-20.04 (CC BY-SA 3.0
and 4.0), mate-backgrounds (CC BY-SA 4.0, nature/*.jpg) and plasma-workspace-wallpapers (CC BY-SA 4.0, 2560x1600.jpg).
Each photograph is scaled so that its short side has between 96 and 192 pixels, and a square of 32 cut out: 500 times
of the left seven tenths for `train`, 100 times of the rest for `test`, which therefore shows other places.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SIDE, SHORT_SIDES, LEFT = 32, (96, 192), 0.7
NUM_CUTS = {"train": 500, "test": 100}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("photographs", type=Path, nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures: dict[str, list[Image.Image]] = {split: [] for split in NUM_CUTS}
    for path in sorted(options.photographs, key=lambda path: path.name):
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        width, _ = photograph.size
        edge = LEFT * width
        for split, count in NUM_CUTS.items():
            left, right = (0, edge) if split == "train" else (edge, width)
            pictures[split] += [cut(photograph, left, right, rng) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image()})
    for split, images in pictures.items():
        rng.shuffle(images)
        rows = datasets.Dataset.from_dict({"image": images}, features=features)
        rows.to_parquet(options.out / f"{split}-00000-of-00001.parquet")
        print(split, len(images))


def cut(photograph: Image.Image, left: float, right: float, rng: np.random.Generator) -> Image.Image:
    """A square between the columns `left` and `right`, scaled to SIDE."""
    short = np.exp(rng.uniform(*np.log(SHORT_SIDES)))
    side = SIDE * min(photograph.size) / short
    x, y = rng.uniform(left, right - side), rng.uniform(0, photograph.height - side)
    return photograph.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


if __name__ == "__main__":
    main()
