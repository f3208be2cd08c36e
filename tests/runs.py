"""What two runs must have in common to be the same run."""

import json
from pathlib import Path

from hf_ddpm.config import checkpoint_names

# When and how often it was started is all that may differ, and where it lies.
OWN = ("run.json", "README.md", "config.yaml", "manifest.json", ".lock")


def trace(folder: Path) -> list[dict]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def differences(a: Path, b: Path) -> list[str]:
    """Names of files that differ: weights, averages, optimizer, previews, figures to the last bit; metrics in all but
    times. Of checkpoints the last counts; which others are kept depends on when the run was ended."""
    found = []
    last = checkpoint_names(a)[-1]
    names = {p.relative_to(folder) for folder in (a, b) for p in folder.rglob("*") if p.is_file()}
    for name in sorted(names):
        is_older = name.parts[0].startswith("checkpoint-") and name.parts[0] != last
        if name.name in OWN or is_older:
            continue
        if not ((a / name).is_file() and (b / name).is_file()):
            found.append(f"{name} is in one only")
        elif name.name == "metrics.jsonl":
            found += [] if trace(a) == trace(b) else [str(name)]
        elif name.name == "progress.json":
            mine, theirs = (json.loads((folder / name).read_text()) for folder in (a, b))
            own = ("seconds", "num_resumes")
            same = all(mine[key] == theirs[key] for key in mine.keys() | theirs.keys() if key not in own)
            found += [] if same else [str(name)]
        elif (a / name).read_bytes() != (b / name).read_bytes():
            found.append(str(name))
    return found
