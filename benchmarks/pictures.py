"""Keeps a run's pictures for README: python benchmarks/pictures.py RUN NAME

Copies the figures of the run in the folder RUN, and what it recorded of itself, to `NAME/` beside this file.
"""

import shutil
import sys
from pathlib import Path


def main(run: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in ("samples.png", "forward.png", "reverse.png", "reverse.gif", "loss.png"):
        shutil.copyfile(run / "figures" / name, target / name)
    shutil.copyfile(run / "run.json", target / "run.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / sys.argv[2])
