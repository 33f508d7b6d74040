"""Tokens to text while they come: no half of a character, and nothing that may become a stop string."""

import codecs
import dataclasses
from collections.abc import Callable, Sequence

from pippin.serve.engine.request import Sampled


@dataclasses.dataclass(frozen=True)
class _Token:
    sampled: Sampled
    start: int  # of its text, in characters of the whole text
    end: int
    whole: bool  # no character is half there after it


class TextStream:
    """The text of one request's tokens.

    Text is given out as soon as it is certain: a character when all of its bytes are there, and what could be the
    start of a stop string when it is not. A token goes out with the last piece of its text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str]):
        """Takes the bytes of each token, and the strings that end the text."""
        self._token_bytes, self._stops = token_bytes, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that was not taken yet
        self._taken = 0  # characters that were
        self._tokens: list[_Token] = []  # those that were not

    def add(self, sampled: Sampled) -> str | None:
        """Adds a token. The result is the stop string that the text has reached, if it has."""
        start = self._taken + len(self._held)
        self._held += self._decoder.decode(self._token_bytes(sampled.token))
        whole = not self._decoder.getstate()[0]
        self._tokens.append(_Token(sampled, start, self._taken + len(self._held), whole))
        # The first to end wins, and of two that end together the longer one.
        found = [(i + len(stop), i, stop) for stop in self._stops if (i := self._held.find(stop)) >= 0]
        if not found:
            return None
        _, index, stop = min(found)
        self._cut(index)
        return stop

    def take(self, *, last: bool = False) -> tuple[str, tuple[Sampled, ...]]:
        """What is certain by now and was not taken before; all there is, if it was the last token."""
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        self._taken += certain
        # Bytes of half a character at the very end are left out, and their tokens are not.
        ready = [i + 1 for i, t in enumerate(self._tokens) if last or (t.whole and t.end <= self._taken)]
        count = ready[-1] if ready else 0
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return text, tuple(token.sampled for token in tokens)

    def _cut(self, index: int) -> None:
        """Leaves out the held text from a place on, and the tokens that have no text before it."""
        self._held = self._held[:index]
        end = self._taken + index
        self._tokens = [t for t in self._tokens if t.start < end or t.end <= end]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text, which does not hold the string, are the string's first ones."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
