"""Keep the pictures of a run of the recipe `fashion-mnist`.

    python -m benchmarks.fashion_mnist.run RUN

Copies the figures in the folder RUN, and its `run.json`, beside this file.
"""

import argparse
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run, target = parser.parse_args().run, Path(__file__).parent
    for name in ("samples.png", "forward.png", "reverse.png", "reverse.gif"):
        shutil.copyfile(run / "figures" / name, target / name)
    shutil.copyfile(run / "run.json", target / "run.json")


if __name__ == "__main__":
    main()
