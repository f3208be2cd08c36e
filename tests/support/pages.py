"""The pages that tell people what to type: README.md and those of `docs/`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>(?:(?!-->).)+) -->\s*)?^ *```(?P<language>python|bash)\n(?P<text>.*?)^ *```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        language: `python` or `bash`.
        text: The code.
        line: The line of the page on which it begins.
        reason: Why it is not run; None: it is.
    """

    language: str
    text: str
    line: int
    reason: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["language"], dedent(match["text"]), line, match["reason"]))
    return [block for block in found if block.language == language]


def commands(page: Path) -> list[list[str]]:
    """The words of each command of the blocks that are run, without what it sets in its environment."""
    lines = []
    for block in blocks(page, "bash"):
        if block.reason is None:
            lines += re.sub(r" *\\\n *", " ", block.text).splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words[sum("=" in word and word[0] != "-" for word in words[:1]) :] for words in parts if words]


def distinct_commands() -> list[list[str]]:
    """Those of all pages, each once."""
    return [list(words) for words in dict.fromkeys(tuple(words) for page in PAGES for words in commands(page))]


def links(page: Path) -> list[str]:
    """The files that a page links or shows, without those of the web and without parts of pages."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)(?:#[^)]*)?\)", text)


def with_small_sizes(code: str) -> str:
    """The code of a block with sizes that take a second: a few steps, of the network in `ddpm-model`."""
    sizes = {"max_train_steps": "1", "ddpm_num_steps": "10", "train_batch_size": "4", "eval_batch_size": "1"}
    sizes |= {"cpu_threads_per_process": "1", "save_figures": "False"}
    if "network=" not in code and "init_from=" not in code:
        sizes["model_config_name_or_path"] = "'ddpm-model/unet'"
    has_steps = re.search(r"max_train_steps=\d+", code)
    if has_steps:
        for name in sizes:
            code = re.sub(rf"\b{name}=[^,)\n]+", f"{name}={sizes[name]}", code)
        missing = [f"{name}={value}" for name, value in sizes.items() if f"{name}=" not in code]
        code = code.replace("max_train_steps=1", ", ".join(["max_train_steps=1", *missing]))
    return code.replace("(batch_size=16)", "(batch_size=2, num_inference_steps=10)")
