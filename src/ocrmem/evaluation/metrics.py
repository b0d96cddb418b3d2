"""What answers are scored by, and the intervals around their means.

Scores take one answer; intervals take one score per probe, in the order of the probes, so that arms are compared on the
same ones. Letter: N probes.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import ArrayLike
from rapidfuzz.distance import Levenshtein

from ocrmem.errors import DataError

LEVEL = 0.95
"""Share of the resamples that an interval holds."""
RESAMPLES = 1000
"""Times that the probes are drawn again, with replacement."""
COPIED_CHARS = 40
"""Shortest run of the history that counts as transcribed."""

_IDENTIFIER = regex.compile(
    r"""
    https?://[^\s<>"']*[\w/] | www\.[^\s<>"']*[\w/]
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | \b0[xX][0-9a-fA-F]+\b
    | \b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b
    | \b(?=[a-fA-F]*\d)(?=\d*[a-fA-F])[0-9a-fA-F]{6,}\b
    | (?<![\w]|\d[.,:/-])\d(?:[.,:/-]?\d)+(?!\w)
    | (?P<name>\b(?P<word>\p{Lu}(?:['’]\p{Lu})?\p{L}*\p{Ll}[\p{L}\p{M}'’-]*)(?:[ ](?&word))*)
    """,
    regex.VERBOSE,
)
_SENTENCE_START = regex.compile(r"(?:^|[.!?…:][\"'”’)\]]*\s)[\s\"'“‘(\[*_-]*\Z", regex.MULTILINE)
_ARTICLES = regex.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True)
class Interval:
    """A mean, or a ratio of means, and a bootstrap interval around it. NaN where it is not defined."""

    mean: float
    low: float
    high: float
    n: int
    """Probes that it is over."""

    def as_json(self) -> dict[str, float] | None:
        """The form of results files; None where it is not defined."""
        if not math.isfinite(self.mean):
            return None
        return {"mean": self.mean, "low": self.low, "high": self.high}


def character_error_rate(prediction: str, target: str) -> float:
    """Levenshtein distance in characters over the characters of the target; above 1 for a long wrong answer.

    An empty target counts as one character.
    """
    return Levenshtein.distance(prediction, target) / max(1, len(target))


def identifiers(text: str) -> list[str]:
    """What a reader cannot guess, in order and as often as it stands there.

    URLs; e-mail addresses; hexadecimal strings (`0x…`, UUIDs, or six and more digits with both figures and letters);
    numbers of two and more digits with the separators `. , : / -` inside them; names, which are runs of capitalised
    words that do not begin a sentence or a line. Words all in capitals are no names: in chats they are shouts.
    """
    found = []
    for match in _IDENTIFIER.finditer(text):
        start = match.start()
        if match["name"] and _SENTENCE_START.search(text, max(0, start - 16), start):
            _, _, rest = match.group().partition(" ")  # the first word alone is capitalised by its place
            if not rest:
                continue
            found.append(rest)
        else:
            found.append(match.group())
    return found


def identifier_recall(prediction: str, target: str) -> float | None:
    """Share of the target's identifiers that the prediction has, each counted as often as it stands in the target.

    None where the target has no identifiers.
    """
    wanted = Counter(identifiers(target))
    if not wanted:
        return None
    hits = sum(min(count, _occurrences(identifier, prediction)) for identifier, count in wanted.items())
    return hits / wanted.total()


def _occurrences(identifier: str, text: str) -> int:
    """Times that an identifier stands in a text by itself, not as a part of a longer word or number."""
    return len(regex.findall(rf"(?<!\w|\d[.,:/-]){regex.escape(identifier)}(?!\w|[.,:/-]\d)", text))


def exact_match(prediction: str, target: str) -> bool:
    """Whether both are the same after the normalisation of SQuAD.

    Source: `evaluate-v1.1.py` of Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text"
    (arXiv:1606.05250): lower case, no ASCII punctuation, no articles, single spaces.
    """
    return _squad_words(prediction) == _squad_words(target)


def token_f1(prediction: str, target: str) -> float:
    """F1 between the words of both as multisets, normalised as in `exact_match` (same source).

    Where either has no words left, 1 if both have none, else 0, as in SQuAD 2.0's script.
    """
    given, wanted = _squad_words(prediction), _squad_words(target)
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def _squad_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def transcribes(prediction: str, history: str, *, target: str = "", min_chars: int = COPIED_CHARS) -> bool:
    """Whether an answer merely copies the history: a run of it makes up more than half of the answer.

    White space of any kind and number counts as one space.

    Args:
        target: the right answer, which may itself stand in the history; copying it does not count.
        min_chars: shortest run that counts.
    """
    prediction, history, target = (" ".join(text.split()) for text in (prediction, history, target))
    length = max(min_chars, len(prediction) // 2 + 1)
    rest = prediction.replace(target, "\n", 1) if target else prediction
    runs = (rest[start : start + length] for start in range(len(rest) - length + 1))
    return any(run in history and run not in target for run in runs)


def mean_interval(values: ArrayLike, *, seed: int, level: float = LEVEL, resamples: int = RESAMPLES) -> Interval:
    """Mean and percentile bootstrap interval.

    Args:
        values: [N]; NaN, and None, where a probe has no value; these are left out.
        seed: the same seed and N give the same resamples.
    """
    values_1N = np.asarray(values, dtype=np.float64)[None]
    return _bootstrap(values_1N, lambda means: means[0], seed=seed, level=level, resamples=resamples)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """Mean of a − b over probes, both [N] and paired; probes where either is missing are left out."""
    return _bootstrap(_paired(a, b), lambda means: means[0] - means[1], seed=seed, level=level, resamples=resamples)


def mean_gain(groups: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike]], *, seed: int) -> Interval:
    """Mean of `gain_recovered` over groups of probes, each (none, arm, full) and drawn again on its own.

    NaN where the gain of one group is not defined.
    """
    found = [_resampled(_paired(*group), _gain, seed=seed + i, resamples=RESAMPLES) for i, group in enumerate(groups)]
    n = sum(count for _, _, count in found)
    return _interval(float(np.mean([m for m, _, _ in found])), np.mean([d for _, d, _ in found], axis=0), n, LEVEL)


def gain_recovered(
    none: ArrayLike,
    arm: ArrayLike,
    full: ArrayLike,
    *,
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """G = (mean CE none − mean CE arm) / (mean CE none − mean CE full): 0 is no memory, 1 the full text.

    The headroom below the line must be positive. Where it is not in the sample, or not in more than
    (1 − level) / 2 of the resamples, G is not defined and all of it NaN; fewer such resamples are left out.

    Args:
        none, arm, full: cross-entropies in nats per token, [N] each, of the same probes in the same order. A probe
            that is NaN or infinite in one is left out of all three. They are resampled together.
    """
    return _bootstrap(_paired(none, arm, full), _gain, seed=seed, level=level, resamples=resamples)


def _gain(means_3R: np.ndarray) -> np.ndarray:
    headroom = means_3R[0] - means_3R[2]
    return np.divide(means_3R[0] - means_3R[1], headroom, out=np.full_like(headroom, np.nan), where=headroom > 0)


def _paired(*arrays: ArrayLike) -> np.ndarray:
    """[arrays, N]"""
    as_floats = [np.asarray(array, dtype=np.float64) for array in arrays]
    shapes = [array.shape for array in as_floats]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise DataError(f"arrays of shapes {shapes} are not paired; expected one value per probe in each, [N].")
    return np.stack(as_floats)


def _bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int, level: float, resamples: int
) -> Interval:
    """Percentile bootstrap of a statistic of means, over probes.

    Args:
        values: [K, N], K paired arrays.
        statistic: from means [K, R] to [R], NaN where not defined.
    """
    return _interval(*_resampled(values, statistic, seed=seed, resamples=resamples), level)


def _resampled(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int, resamples: int
) -> tuple[float, np.ndarray, int]:
    """The statistic in the sample and in each resample [R], and the number of probes without a value missing."""
    values = values[:, np.isfinite(values).all(axis=0)]
    n = values.shape[1]
    if n == 0:
        return math.nan, np.full(resamples, math.nan), 0
    rng = np.random.default_rng(seed)
    means = np.stack([values[:, rng.integers(n, size=n)].mean(axis=1) for _ in range(resamples)], axis=1)
    return float(statistic(values.mean(axis=1, keepdims=True))[0]), statistic(means), n


def _interval(mean: float, drawn: np.ndarray, n: int, level: float) -> Interval:
    tail = (1 - level) / 2
    if math.isnan(mean) or np.isnan(drawn).mean() > tail:
        return Interval(math.nan, math.nan, math.nan, n)
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)
