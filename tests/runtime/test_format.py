"""Numbers and recorded values as people read them."""

from __future__ import annotations

import pytest

from hf_ddpm.runtime.format import format_amount, format_duration, format_measurement, format_value


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.312, "0.31 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (3605, "1 h"),
        (93784, "1 d 2 h 3 min"),
        (100 * 86400, "100 d"),
    ],
)
def test_format_duration_gives_days_hours_and_minutes(seconds: float, text: str):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999.4, "999 B"), (999.6, "1 kB"), (1_234_567, "1.23 MB"), (5e18, "5e+03 PB")]
)
def test_format_amount_gives_three_digits(value: float, text: str):
    assert format_amount(value, "B") == text
    assert format_amount(value, "") == text.removesuffix("B").rstrip()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.2345678, 0.0123, "1.235 ± 0.012"),
        (12345.678, 21.0, "12,346 ± 21"),
        (-3.6e-5, 9.8e-5, "-0.000036 ± 0.000098"),
        (0.123456, None, "0.1235"),
        (0.123456, 0.0, "0.1235"),
        (None, None, "not finite"),
    ],
)
def test_format_measurement_gives_two_digits_of_the_error(value: float | None, error: float | None, text: str):
    assert format_measurement(value, error) == text


def test_format_value_makes_text_that_fits_a_table():
    recorded = {"steps": 1234, "ratio": 0.123456, "name": "a|b\nc", "ema": True, "sizes": [1000], "none": None}
    assert format_value(recorded) == {
        "steps": "1,234",
        "ratio": "0.1235",
        "name": "a\\|b c",
        "ema": True,
        "sizes": [1000],
        "none": None,
    }
