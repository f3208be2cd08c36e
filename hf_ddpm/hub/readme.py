"""The README of a repository: the part between two marks is ours, all else is its author's."""

from __future__ import annotations

import json
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

BEGIN = "<!-- hf_ddpm: from here to its end, this is written anew with each measurement and each upload -->"


END = "<!-- hf_ddpm: end -->"


def merged(before: str, card: str) -> str:
    """The README `before` with the part between BEGIN and END, and the results, of `card`.

    Its other metadata stay, and are completed; a README without the two lines gets them at its end.
    """
    if not before.strip():
        return card
    theirs: Any = ModelCard(before, ignore_metadata_errors=True)
    ours: Any = ModelCard(card)
    part = _marked(ours.text)
    assert part is not None
    known = _marked(theirs.text)
    rest = theirs.text.replace(BEGIN, "").replace(END, "")  # one of them alone
    text = theirs.text.replace(known, part) if known else f"{rest.rstrip()}\n\n{part}\n"
    old, new = theirs.data.to_dict(), ours.data.to_dict()
    tags = list(dict.fromkeys([*(old.get("tags") or []), *(new.get("tags") or [])]))
    foreign = [r for r in theirs.data.eval_results or [] if REFERENCE not in (r.metric_args or {})]
    results = foreign + (ours.data.eval_results or [])
    measured = {key: new[key] for key in ("datasets", "base_model") if key in new}
    data = {**new, **old, **measured, "tags": tags}
    data = {key: value for key, value in data.items() if key not in ("model-index", "model_name")}
    name = getattr(theirs.data, "model_name", None) or getattr(ours.data, "model_name", None)
    theirs.data = ModelCardData(**data, eval_results=results or None, model_name=name if results else None)
    theirs.text = text
    return str(theirs)


def own_text(readme: str) -> str:
    """What of a README is its author's: neither metadata nor ours."""
    text = ModelCard(readme, ignore_metadata_errors=True).text if readme.strip() else ""
    return text.replace(_marked(text) or "", "").strip()


def _marked(text: str) -> str | None:
    first = text.find(BEGIN)
    last = text.find(END, first + 1)
    return text[first : last + len(END)] if 0 <= first < last else None


def named_repository(readme: str) -> str | None:
    """What the examples of a card load; None if it has none of ours."""
    found = re.search(r'from_pretrained\((".+?")', _marked(readme) or "")
    return json.loads(found[1]) if found else None


REFERENCE = "reference_sha256"  # in the arguments of each metric of ours
