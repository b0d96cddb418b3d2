"""The ledger: identifiers that pictures lose, kept as text.

```
turn ─▶ identifiers, longest match first ─▶ newest first, each once ─▶ "https://… · 4.5 kg · main.py" within a budget
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import regex

Kind = Literal["url", "email", "file", "hex", "date", "number", "code", "quote"]

_MONTH = (
    r"\b(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b"
)
_UNIT = (
    r"(?:[%‰°]|°\s?[CF]|[kKMGTmµμn]?(?:i?B(?:/s)?|b(?:ps|/s)|Hz|W|Wh|V|A|g|m|l|L|s|Pa|J|N|eV|bit|Ω|F|mol)|cm|mm|km/?h?|mph|"
    r"min(?:utes?|s)?|h(?:ours?|rs?)?|sec(?:onds?|s)?|days?|weeks?|months?|years?|kg|mg|lbs?|oz|ft|feet|in(?:ches)?|"
    r"miles?|am|pm|a\.m\.|p\.m\.|dollars?|euros?|pounds?|USD|EUR|GBP|CHF|px|tokens?|pages?|rpm|dB|ms|ns|us)"
)
_NUMBER = (
    r"[-+]?(?:\d{1,3}(?:[ \u202f]\d{3}){1,6}|\d{1,40}(?:[,.'_]\d{3}){0,12})(?:[.,:/]\d{1,20}){0,8}(?:[eE][-+]?\d{1,4})?"
)
_PHONE = r"\+\d{1,3}(?:[ -]?\(\d{1,4}\))?(?:[ -]\d{2,4}){1,5}|\(\d{2,4}\)(?:[ -]\d{2,4}){1,4}|\d{3,4}(?:-\d{2,4}){1,3}"

# Every repetition is bounded: text without an end and without a space must not take time without an end.
PATTERNS: tuple[tuple[Kind, str], ...] = (
    (
        "url",
        r"\b(?:https?|ftp|ssh|git|file|s3)://[^\s<>\"'`]{0,200}[^\s<>\"'`.,;:!?)\]}]|\bwww\.[^\s<>\"'`]{0,200}[\w/]",
    ),
    ("email", r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}\b"),
    # Within one line, and not across another quotation; an apostrophe opens no quotation inside a word.
    ("quote", r"\"[^\"\n]{2,80}\"|“[^”\n]{2,80}”|«[^»\n]{2,80}»|`[^`\n]{1,80}`|(?<!\w)'[^'\n]{2,60}'(?!\w)"),
    (
        "hex",
        r"\b0[xX][0-9a-fA-F]{1,64}\b|\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b|"
        r"\b(?:[0-9a-fA-F]{2}[:-]){3,31}[0-9a-fA-F]{2}\b|#[0-9a-fA-F]{6}\b|"
        r"\b(?=[0-9a-f]{0,64}\d)(?=[0-9a-f]{0,64}[a-f])[0-9a-f]{7,64}\b",
    ),
    (
        "date",
        r"\b\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?(?:Z|[+-]\d{2}:?\d{2})?)?\b|"
        r"\b\d{1,2}[./]\d{1,2}[./](?:\d{4}|\d{2})\b|"
        rf"(?i:\b{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?\b|"
        rf"\b\d{{1,2}}(?:st|nd|rd|th|\.)?(?: of)? {_MONTH}(?:,? \d{{4}})?\b|"
        r"\b\d{1,2}:\d{2}(?::\d{2})?(?:\s?[ap]\.?m\b\.?)?)",
    ),
    (
        "file",
        r"(?:(?<![\w/])(?:~|\.{1,2})?/[\w.@+-]{1,80}(?:/[\w.@+-]{1,80}){0,20}/?|\b[A-Za-z]:\\[\w.\\-]{0,200}\w|"
        r"(?<![\w@+.-])[\w@+-]{1,80}(?:/[\w.@+-]{1,80}){0,20}\.(?=\w{0,8}[A-Za-z])"
        r"(?:[a-z][a-z0-9]{1,4}|[cho]|tar\.gz|JPG|PNG|PDF|CSV|TXT)(?!\w|\.\w))",
    ),
    (
        "number",
        rf"(?<![\w.])(?:{_PHONE})(?![\w])|[$€£¥]\s?{_NUMBER}(?:\s?[kKMB]\b)?|"
        rf"(?<![\w.]){_NUMBER}(?:\s?{_UNIT}(?!\w))?(?![\w])",
    ),
    (
        "code",
        # snake_case, camelCase, dotted.names, calls(), --options, AB-123, v1.2, words with digits
        r"\b[A-Za-z]\w{0,60}_\w{1,60}\b|\b[a-z]{1,40}(?:[A-Z][a-z0-9]{1,40}){1,8}\b|\b(?:[A-Z][a-z0-9]{1,40}){2,8}\b|"
        r"(?<![\w.])[A-Za-z_]\w{1,60}(?:(?:\.|::)[A-Za-z_]\w{1,60}){1,8}(?:\(\))?|\b[A-Za-z_]\w{0,60}\(\)|"
        r"(?<!\S)--[a-z][\w-]{1,40}|\b[A-Za-z]{1,20}(?:-[A-Za-z0-9]{1,20}){0,4}-\d[\w.-]{0,30}\w\b|"
        r"\b[A-Z]{2,20}(?:-[A-Z0-9]{1,20}){1,6}\b|\b[A-Za-z]{1,20}-\d\b|"
        r"\bv?\d{1,9}(?:\.\d{1,9}){2,6}(?:[-+.]\w{1,20}){0,4}|\bv\d{1,9}(?:\.\d{1,9}){0,6}\b|"
        r"\b(?=[A-Za-z]{0,40}\d)(?=\d{0,40}[A-Za-z])[A-Za-z0-9]{3,40}\b",
    ),
)
"""Kinds in the order in which they are tried at one place of the text."""
_ANY = regex.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in PATTERNS))

SEPARATOR = " · "
"""Between two identifiers in the ledger's text."""
LONGEST = 200
"""Characters of the longest identifier that is kept; what is longer is no identifier."""
MAX_ENTRIES = 4096
"""Identifiers that a ledger remembers; more than any budget holds."""
COUNTED_AT_ONCE = 64
"""Identifiers tokenised in one call; most ledgers show no more."""


def identifiers(text: str) -> Iterator[tuple[Kind, str]]:
    """Kind and text of each identifier in a text, in order.

    Identifiers are numbers (with their units), dates and times, hexadecimal, URLs, e-mail addresses, file names,
    code names and quoted strings (without their quotation marks). A single digit without a unit is none.
    """
    for match in _ANY.finditer(text):
        kind, found = match.lastgroup, match.group().strip()
        if kind == "quote":
            found = found[1:-1].strip()
        if not found or len(found) > LONGEST or (kind == "number" and len(found) < 2):
            continue
        yield cast("Kind", kind), found


class Ledger:
    """The identifiers of a history, newest first, each once.

    Args:
        heading: text in front of them in a prompt.
        count_tokens: tokens of each of several texts, by the LLM's tokenizer.
    """

    def __init__(self, *, heading: str, count_tokens: Callable[[Sequence[str]], list[int]]) -> None:
        self.heading = heading
        self._count_tokens = count_tokens
        self._tokens: dict[str, int] = {}
        """Identifier to its tokens with the separator, oldest first; 0: not counted yet."""
        (self._heading_tokens,) = count_tokens([heading])

    @property
    def entries(self) -> list[str]:
        """Every identifier kept, newest first."""
        return list(reversed(self._tokens))

    def add(self, text: str) -> None:
        """Take the identifiers of a text that is newer than all before it."""
        for _, found in identifiers(text):
            self._tokens[found] = self._tokens.pop(found, 0)
        while len(self._tokens) > MAX_ENTRIES:
            del self._tokens[next(iter(self._tokens))]

    def shown(self, budget: int) -> list[str]:
        """The newest identifiers that fit, with the heading, into so many tokens."""
        left = budget - self._heading_tokens
        kept: list[str] = []
        newest = self.entries
        for begin in range(0, len(newest), COUNTED_AT_ONCE):
            part = newest[begin : begin + COUNTED_AT_ONCE]
            uncounted = [entry for entry in part if not self._tokens[entry]]
            if uncounted:
                counts = self._count_tokens([entry + SEPARATOR for entry in uncounted])
                self._tokens.update(zip(uncounted, counts, strict=True))
            for entry in part:
                left -= self._tokens[entry]
                if left < 0:
                    return kept
                kept.append(entry)
        return kept

    def text(self, budget: int) -> str:
        """What stands in a prompt for at most so many tokens; "" where nothing fits."""
        kept = self.shown(budget)
        return self.heading + SEPARATOR.join(kept) if kept else ""
