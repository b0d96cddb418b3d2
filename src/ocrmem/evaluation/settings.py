"""How much an evaluation asks, and of which arms."""

from __future__ import annotations

from dataclasses import dataclass

from ocrmem.errors import ConfigError
from ocrmem.evaluation.arms import Contexts
from ocrmem.evaluation.rivals import RIVALS

UNTRAINED = "untrained-projection"
ALL_ARMS = (*Contexts.ALL_ARMS, UNTRAINED)
"""Every arm that an evaluation can have besides rivals, which it has where their folders are given."""
ALWAYS = ("none", "full-text", "memory")
"""Arms of every evaluation: what G is measured between, and what it is about."""
PARTS = ("reading", "using", "cost")
"""What an evaluation consists of."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How much is asked."""

    parts: tuple[str, ...] = PARTS
    """Which of `PARTS` are run; the others stay empty."""
    samples: int = 400
    """Probes of cued recall and of cloze questions, each; a fourth of that for each length of reading."""
    next_turn_samples: int = 2000
    """Probes of the next turn: its headroom is small."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Probes are dealt out over these seeds."""
    reading_chars: tuple[int, ...] = (256, 1024, 4096)
    """Lengths of the reading probes."""
    history_chars: int = 2048
    """Longest history of the other probes."""
    cost_repeats: int = 5
    """How often each part of the cost is timed, after one run that is not counted."""
    arms: tuple[str, ...] = ()
    """Arms of `using`, besides `none`, `full-text`, `memory` and the rivals that are given; empty: all."""
    answers: bool = True
    """Whether texts are read aloud and questions answered too, and not scored teacher-forced alone."""
    answer_tokens: int = 48
    """Longest answer to a question."""
    conversations: str = "chitchat/heldout.jsonl"
    """Held-out conversations."""
    prose: str = "wiki-leads/heldout.jsonl"
    """Held-out documents with titles."""

    def __post_init__(self) -> None:
        if not self.parts or set(self.parts) - set(PARTS):
            raise ConfigError(f"parts {', '.join(self.parts) or 'none'}: expected some of {', '.join(PARTS)}.")
        if min(self.samples, self.next_turn_samples, *self.reading_chars) < 1 or not self.seeds:
            raise ConfigError("an evaluation needs at least one sample, and at least one seed.")
        unknown = sorted(set(self.arms) - set(ALL_ARMS))
        if unknown:
            raise ConfigError(f"unknown arms {', '.join(unknown)}: expected some of {', '.join(ALL_ARMS)}.")

    def asks_for(self, arm: str) -> bool:
        """Whether an arm takes part in `using`."""
        return not self.arms or arm in (*ALWAYS, *RIVALS, *self.arms)

    @property
    def whole(self) -> bool:
        """Whether nothing is left out that could be had."""
        return set(self.parts) == set(PARTS) and not self.arms and self.answers

    def not_asked_for(self) -> list[tuple[str, str]]:
        """Arms of `using`, if it is run, that could be had and were not asked for, and that reason."""
        return [(arm, "not asked for") for arm in ALL_ARMS if "using" in self.parts and not self.asks_for(arm)]
