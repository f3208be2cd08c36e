"""The pages of what was measured: one for each `benchmarks/QUESTION/table.md`, and the list of the questions."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "measured"


def write_pages(docs: Path) -> None:
    """Write a page for each table of `benchmarks/` and one for its README into `docs/measured/`, which git ignores.

    A page that is already right is left alone, so that Sphinx does not read it again.
    """
    benchmarks = docs.parent / "benchmarks"
    readme = (benchmarks / "README.md").read_text(encoding="utf-8")
    titles = {folder: question.strip() for question, folder in re.findall(r"^\| (.*?)\[table\]\((\w+)/", readme, re.M)}
    pages = {"index": _index(readme, sorted(titles))}
    for folder, title in titles.items():
        table = (benchmarks / folder / "table.md").read_text(encoding="utf-8")
        pages[folder] = f"# {title}\n\n" + re.sub(r"^# .*\n", "", table)
    (docs / FOLDER).mkdir(exist_ok=True)
    for path in (docs / FOLDER).glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = docs / FOLDER / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _index(readme: str, folders: list[str]) -> str:
    """Return the README of the benchmarks with links that are right in another folder, and a list of the pages."""
    text = re.sub(r"\]\((\w+)/table\.md\)", r"](\1.md)", readme)
    text = re.sub(r"\]\((\w+/[^)]*)\)", r"](../../benchmarks/\1)", text)
    return f"{text}\n```{{toctree}}\n:hidden:\n\n" + "\n".join(folders) + "\n```\n"


def with_links(text: str) -> str:
    """Return a page of `docs/` with the links that are right in the site.

    A link to the file of a table becomes one to its page. Another Markdown file outside `docs/` is no page, and is
    linked as a file.
    """
    text = text.replace("](../benchmarks/README.md", f"]({FOLDER}/index.md")
    text = re.sub(r"\]\(\.\./(examples/\w+\.ipynb)", r"](\1", text)
    text = re.sub(r"\]\(\.\./benchmarks/(\w+)/table\.md", rf"]({FOLDER}/\1.md", text)
    return re.sub(r"\]\((\.\./[^)#\s]+\.md)\)", r"](path:\1)", text)
