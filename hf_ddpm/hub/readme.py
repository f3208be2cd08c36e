"""The README of a repository: the part between two marks is our card, and all else is its author's."""

from __future__ import annotations

import json
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

BEGIN = "<!-- hf_ddpm: from here to its end, this is written anew with each measurement and each upload -->"
END = "<!-- hf_ddpm: end -->"
# Each result of ours has this key among its `metric_args`; by it our results are told from the author's.
REFERENCE_KEY = "reference_sha256"


def merge_readme(readme: str, card: str) -> str:
    """Return a README with our card brought up to date and everything else as its author wrote it.

    The part between BEGIN and END is replaced; a README without it gets it at its end. In the metadata, the author's
    values win, but for the data, the base model and our results, which a run knows better; tags are added up.

    Args:
        readme: The README as it is; may be empty.
        card: Our card, with its metadata.

    Raises:
        ValueError: When the metadata of `readme` cannot be read.
    """
    if not readme.strip():
        return card
    author_readme: Any = ModelCard(readme, ignore_metadata_errors=True)
    our_card: Any = ModelCard(card)
    author_readme.text = _merge_text(author_readme.text, our_card.text)
    author_readme.data = _merge_metadata(author_readme.data, our_card.data)
    return str(author_readme)


def _merge_text(author_text: str, our_text: str) -> str:
    new_part = _marked_part(our_text)
    assert new_part is not None
    old_part = _marked_part(author_text)
    if old_part is not None:
        return author_text.replace(old_part, new_part)
    # Somebody may have deleted one of the two marks.
    without_marks = author_text.replace(BEGIN, "").replace(END, "")
    return f"{without_marks.rstrip()}\n\n{new_part}\n"


def _merge_metadata(author_data: Any, our_data: Any) -> ModelCardData:
    author_values, our_values = author_data.to_dict(), our_data.to_dict()
    tags = [*(author_values.get("tags") or []), *(our_values.get("tags") or [])]
    values = {
        **our_values,
        **author_values,
        **{key: our_values[key] for key in ("datasets", "base_model") if key in our_values},
        "tags": list(dict.fromkeys(tags)),
    }
    # The results have a model's name beside them, and stand under this key together.
    for key in ("model-index", "model_name"):
        values.pop(key, None)
    author_results = [r for r in author_data.eval_results or [] if REFERENCE_KEY not in (r.metric_args or {})]
    results = author_results + (our_data.eval_results or [])
    model_name = getattr(author_data, "model_name", None) or getattr(our_data, "model_name", None)
    return ModelCardData(**values, eval_results=results or None, model_name=model_name if results else None)


def author_text(readme: str) -> str:
    """Return the part of a README that its author wrote: neither metadata nor our card."""
    text = ModelCard(readme, ignore_metadata_errors=True).text if readme.strip() else ""
    return text.replace(_marked_part(text) or "", "").strip()


def named_repository(readme: str) -> str | None:
    """Return the repository that the examples of our card load, or None if the README has no card of ours."""
    example = re.search(r'from_pretrained\((".+?")', _marked_part(readme) or "")
    return json.loads(example[1]) if example else None


def _marked_part(text: str) -> str | None:
    """Return the text from BEGIN to END, both included, or None if one of them is missing."""
    first = text.find(BEGIN)
    last = text.find(END, first + 1)
    return text[first : last + len(END)] if 0 <= first < last else None
