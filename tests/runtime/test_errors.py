"""What is shown of other libraries' errors."""

import json
import urllib.parse

import pytest

from hf_ddpm.runtime.errors import in_one_line, without_tokens

# As copied from a page or a document: a zero-width space, a no-break space, a curly quote, a line break, a letter.
ODD = ["hf_AbCdEfGh\u200bSecret1234", "hf_AbCdEfGh\u00a0Secret1234", "hf_AbCdEfGhSecret1234\u2019"]
ODD += ["hf_AbCdEfGhSecret1234\n", "hf_AbCdEfGhSecr\u00e9t1234", "api-AbCdEfGhSecret1234"]
FORMS = [
    str,
    repr,
    ascii,
    json.dumps,
    urllib.parse.quote,
    lambda token: repr(token.encode()),
    lambda token: repr([token]),
]


@pytest.mark.parametrize("token", ODD)
@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_a_token_is_shown(token, form, monkeypatch):
    assert "hf_..." in without_tokens(f"it said {form(token)}.", token)
    monkeypatch.setenv("HF_TOKEN", token)
    shown = in_one_line(ValueError(f"Bearer {form(token)}"), with_type=True)
    assert shown.startswith("ValueError: Bearer ")
    for part in ("AbCd", "Secr", "1234"):
        assert part not in shown


def test_error_of_a_header_shows_no_token(monkeypatch):
    """The repr of this error shows the whole header, which huggingface_hub retries and logs."""
    monkeypatch.setenv("HF_TOKEN", ODD[0])
    with pytest.raises(UnicodeEncodeError) as error:
        f"Bearer {ODD[0]}".encode("ascii")
    assert "AbCdEfGh" in repr(error.value)
    assert "AbCdEfGh" not in in_one_line(error.value, with_type=True)


def test_token_that_nobody_named_is_hidden(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert without_tokens(f"got hf_{'a1' * 17}, hf_ddpm") == "got hf_..., hf_ddpm"
    assert without_tokens("Authorization: Bearer abc/def.ghi/jkl.mno") == "Authorization: Bearer hf_..."


@pytest.mark.parametrize("placeholder", ["none", "test", "hub"])
def test_placeholder_of_a_token_hides_no_other_words(placeholder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", placeholder)
    assert without_tokens(f"{placeholder}, latest, a Bearer token") == f"{placeholder}, latest, a Bearer token"


def test_message_of_an_error_is_one_line_and_never_empty():
    assert in_one_line(OSError("a\n  b")) == "a b"
    assert in_one_line(KeyError("size"), with_type=True) == "KeyError: 'size'"
    assert in_one_line(ValueError()) == in_one_line(ValueError(), with_type=True) == "ValueError"
