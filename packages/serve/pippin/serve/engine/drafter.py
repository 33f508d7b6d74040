"""Guesses of what comes next in a text, from the text itself."""

from collections.abc import Sequence

# The fewest and the most tokens that have to have come before, in the same order.
_LENGTHS = (3, 2)


class Drafter:
    """Guesses that a text goes on as it did the last time that its newest tokens came in it.

    Source: Saxena 2023, prompt lookup decoding; Yang et al. 2023, arXiv:2304.04487, section 3 (drafts that are copied).
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # tokens -> where the text went on behind them, lately
        self._seen = 0  # tokens whose ends are in there

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most so many tokens to follow a text, which has only grown since the last call."""
        for end in range(self._seen + 1, len(tokens)):  # behind the last one, nothing came yet
            for length in _LENGTHS:
                if end >= length:
                    self._places[tuple(tokens[end - length : end])] = end
        self._seen = max(self._seen, len(tokens) - 1)
        for length in _LENGTHS:
            place = self._places.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if place is not None:
                return list(tokens[place : place + count])
        return []
