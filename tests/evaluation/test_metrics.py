"""Scores against values worked out by hand, intervals against known distributions."""

import math

import numpy as np
import pytest

from ocrmem.errors import DataError
from ocrmem.evaluation.metrics import (
    character_error_rate,
    exact_match,
    gain_recovered,
    identifier_recall,
    identifiers,
    mean_gain,
    mean_interval,
    paired_difference,
    token_f1,
    transcribes,
)

HISTORY = (
    "user: I grew up in a small village by the sea, and my father mended nets for the whole coast.\n"
    "assistant: That sounds lovely! Did you ever go out with the boats yourself, or was it too dangerous?"
)


@pytest.mark.parametrize(
    ("prediction", "target", "rate"),
    [
        ("kitten", "sitting", 3 / 7),
        ("", "abcd", 1),
        ("abcdefgh", "ab", 3),
        ("same", "same", 0),
        ("x", "", 1),
        ("", "", 0),
    ],
)
def test_character_error_rate(prediction, target, rate):
    assert character_error_rate(prediction, target) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It cost 1,234.50 in 2019, 7 less than before.", ["1,234.50", "2019"]),
        ("On 2024-01-02 at 12:30, call 555-1234.", ["2024-01-02", "12:30", "555-1234"]),
        ("Not the 19th or x12, but 19.", ["19"]),
        (
            "keys 0xFF, deadbeef01 and 3f2504e0-4f89-11d3-9a0c-0305e82c3301; facade",
            ["0xFF", "deadbeef01", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"],
        ),
        (
            "Mail ann.b+c@mail.example.org or see https://example.org/a?b=1.",
            ["ann.b+c@mail.example.org", "https://example.org/a?b=1"],
        ),
        (
            "The mayor, Anna de Vries, met Jean-Luc O'Neil in New York City. And Bob I met in Rome WOW",
            ["Anna", "Vries", "Jean-Luc O'Neil", "New York City", "Bob", "Rome"],
        ),
        ('user: Hello there\nDave went. Then "Ellen" left! "Ok"', ["Ellen"]),
        ("Dave Brown went.", ["Brown"]),
        ("", []),
    ],
)
def test_identifiers(text, found):
    assert identifiers(text) == found


def test_identifier_recall_counts_every_time_it_stands_there():
    target = "we met Ann in 1984, and Ann again in 1991"
    assert identifiers(target) == ["Ann", "1984", "Ann", "1991"]
    assert identifier_recall(target, target) == 1
    assert identifier_recall("Ann, 1984", target) == 0.5
    assert identifier_recall("Ann Ann Ann Ann", target) == 0.5
    assert identifier_recall("Annie 19844 1991.5 21-1991 xAnn", target) == 0
    assert identifier_recall("anything", "nothing to find here, 7") is None


def test_squad_scores():
    assert exact_match(" The Eiffel-Tower! ", "eiffeltower")
    assert not exact_match("Eiffel Tower", "eiffeltower")
    assert token_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("cat cat cat", "cat dog") == pytest.approx(2 * 1 / (3 + 2))
    assert token_f1("The", "a") == 1
    assert token_f1("", "word") == token_f1("word", "the") == 0


def test_transcribing():
    assert transcribes(HISTORY, HISTORY)
    assert transcribes("Sure: " + HISTORY[20:90], HISTORY)
    assert transcribes(HISTORY[20:80].replace(" ", "\n"), HISTORY)
    assert not transcribes(HISTORY[20:55], HISTORY), "too short"
    assert transcribes(HISTORY[20:55], HISTORY, min_chars=30)
    assert not transcribes("Yes, I did, but only in summer when the weather was calm.", HISTORY)
    copied = HISTORY[20:65]
    assert not transcribes(f"You said {copied}, and I have been thinking about that ever since, you know.", HISTORY)


def test_the_right_answer_is_no_transcript():
    target = "sea, and my father mended nets for the whole coast."
    assert transcribes(target, HISTORY)
    assert not transcribes(target, HISTORY, target=target)
    assert not transcribes(target[:-2], HISTORY, target=target)
    assert not transcribes(target + "\nassistant: That sounds", HISTORY, target=target)
    assert transcribes(HISTORY, HISTORY, target=target)


def test_mean_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(0).normal(3, 2, size=900)
    interval = mean_interval(values, seed=0)
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * values.std() / 30, rel=0.1)
    assert interval.low < interval.mean < interval.high
    narrow = mean_interval(values, seed=0, level=0.5)
    assert (narrow.high - narrow.low) / 2 == pytest.approx(0.674 * values.std() / 30, rel=0.1)
    assert mean_interval(values, seed=0) == interval != mean_interval(values, seed=1)


def test_missing_values_are_left_out():
    assert mean_interval([1.0, None, math.nan, 1.0], seed=0).as_json() == {"mean": 1, "low": 1, "high": 1}
    assert mean_interval([1.0, None, math.nan, 1.0], seed=0).n == 2
    nothing = mean_interval([None, None], seed=0)
    assert (nothing.n, nothing.as_json()) == (0, None)
    assert mean_interval([True, False, True, True], seed=0).mean == 0.75


def test_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(1)
    a = rng.normal(size=400) * 5
    b = a - 0.3 + rng.normal(size=400) * 0.1
    interval = paired_difference(a, b, seed=0)
    assert interval.mean == pytest.approx(0.3, abs=0.02)
    assert interval.high - interval.low < 0.03
    assert paired_difference([1.0, math.nan, 3.0], [0.0, 1.0, None], seed=0).n == 1
    with pytest.raises(DataError, match=r"arrays of shapes \[\(2,\), \(3,\)\] are not paired; expected one value per"):
        paired_difference([1, 2], [1, 2, 3], seed=0)


def test_gain_recovered():
    rng = np.random.default_rng(2)
    full = rng.gamma(4, 0.5, size=500)
    none = full + rng.gamma(4, 0.25, size=500)
    arm = none - 0.6 * (none - full)
    gain = gain_recovered(none, arm, full, seed=0)
    assert gain.mean == pytest.approx(0.6)
    assert gain.high - gain.low < 1e-9, "resampled together, a constant share has no spread"
    noisy = gain_recovered(none, arm + rng.normal(size=500) * 0.5, full, seed=0)
    assert noisy.low < 0.6 < noisy.high
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(500), rel=0.15)
    assert gain_recovered(none, none, full, seed=0).mean == 0
    assert gain_recovered(none, full, full, seed=0).mean == 1
    arm[3], none[4], full[5] = math.nan, math.inf, math.nan
    assert gain_recovered(none, arm, full, seed=0).n == 497


def test_mean_gain_weighs_groups_the_same():
    rng = np.random.default_rng(4)
    groups = []
    for share, n in ((0.2, 50), (0.8, 500)):
        full = rng.gamma(4, 0.5, size=n)
        none = full + rng.gamma(4, 0.25, size=n)
        groups.append((none, none - share * (none - full), full))
    gain = mean_gain(groups, seed=0)
    assert gain.mean == pytest.approx(0.5)
    assert gain.n == 550
    assert gain.high - gain.low < 1e-9
    none, _, full = groups[0]
    assert mean_gain([*groups, (full, none, none)], seed=0).as_json() is None, "one group has no headroom"


def test_gain_without_headroom_is_not_defined():
    rng = np.random.default_rng(3)
    full = rng.normal(2, 1, size=200)
    for none in (full, full - 0.5, full + rng.normal(0.02, 1, size=200)):
        gain = gain_recovered(none, full, full, seed=0)
        assert gain.as_json() is None
        assert math.isnan(gain.low)
        assert math.isnan(gain.high)
        assert gain.n == 200
