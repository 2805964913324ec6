"""How many tokens to draft for a call, from the acceptance and the times measured while a text is generated.

With acceptance a, k drafted tokens give (1 - a^(k + 1)) / (1 - a) tokens per verifying call on average (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192, equation 1), which takes `call_seconds(k + 1) + k * draft_seconds`. The k with the most tokens
per second is chosen. Where that is 0, nothing is drafted for some tokens; then drafting is tried again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

FIRST = 4
"""The number of tokens that is drafted before anything is known."""
SHORTEST_PAUSE = 16
"""Calls without drafts after drafting was slower; each failed trial doubles it."""
LONGEST_PAUSE = 256
_PROVEN = 16
"""Calls with drafts in a row after which the next pause is a short one again."""
_REMEMBERED = 9
"""The last times of a kind whose median counts; one slow call of nine changes nothing."""
_DECAY = 0.9
"""The weight of earlier calls in the acceptance, for each later call."""
_PRIOR = (1.0, 2.0)
"""Accepted and tested tokens before the first call."""


class Pace:
    """Chooses the number of drafted tokens for each call.

    Attributes:
        most: the most tokens that are drafted for a call.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._calls: dict[int, deque[float]] = {}
        self._draft: deque[float] = deque(maxlen=_REMEMBERED)
        self.start()

    def start(self) -> None:
        """Forget the acceptance, which depends on the text; times stay."""
        self._accepted, self._tested = _PRIOR
        self._last = self._streak = 0
        self._pause, self._waits = SHORTEST_PAUSE, 0

    def count(self) -> int:
        """The number of tokens to draft for the next call; 0 in a pause, and for the first call, which times one token."""
        if self._waits or 1 not in self._calls:
            return 0
        return self._best() if self._last else min(FIRST, self.most)

    def observe(self, drafted: int, accepted: int, draft_seconds: float, call_seconds: float) -> None:
        """Take in a call that verified `drafted` tokens and accepted the first `accepted`.

        Args:
            draft_seconds: the time of drafting all of them.
            call_seconds: the time of the call.
        """
        self._calls.setdefault(drafted + 1, deque(maxlen=_REMEMBERED)).append(call_seconds)
        if not drafted:
            self._waits = max(0, self._waits - 1)
            return
        self._draft.append(draft_seconds / drafted)
        self._accepted = self._accepted * _DECAY + accepted
        self._tested = self._tested * _DECAY + min(drafted, accepted + 1)
        self._last, self._streak = drafted, self._streak + 1
        if self._best():
            if self._streak == _PROVEN:
                self._pause = SHORTEST_PAUSE
            return
        self._waits, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        # The next trial decides by what it finds.
        self._accepted, self._tested = _PRIOR
        self._last = self._streak = 0

    def _best(self) -> int:
        """The number of drafted tokens with the most tokens per second, at most twice the last: times are extrapolated."""
        acceptance = self._accepted / self._tested
        draft = median(self._draft) if self._draft else 0.0
        known = {size: median(times) for size, times in self._calls.items()}
        best, highest, tokens = 0, 0.0, 0.0
        for drafted in range(min(self.most, max(FIRST, 2 * self._last)) + 1):
            tokens += acceptance**drafted
            rate = tokens / max(_call_seconds(known, drafted + 1) + drafted * draft, 1e-9)
            if rate > highest:
                best, highest = drafted, rate
        return best


def _call_seconds(known: Mapping[int, float], tokens: int) -> float:
    """The time of a call with so many tokens: measured, or on the line through the nearest measured numbers of tokens.

    Args:
        known: times by number of tokens, that of one token among them.
    """
    if tokens in known or len(known) == 1:
        return known.get(tokens, known[1])
    below = sorted((size for size in known if size < tokens), reverse=True)
    above = min((size for size in known if size > tokens), default=None)
    first, second = (below[1], below[0]) if above is None else (below[0], above)
    slope = max(0.0, (known[second] - known[first]) / (second - first))
    return known[first] + slope * (tokens - first)
