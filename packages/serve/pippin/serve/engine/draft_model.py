"""Guesses of what comes next in texts, from a smaller model."""

import dataclasses
import logging
from collections.abc import Sequence

from pippin.serve.engine.request import Sampling, Sums
from pippin.serve.engine.scheduler import Row, Runner

_log = logging.getLogger(__name__)

_MANY_FAILURES = 3  # one after the other
# Tokens of answers that are read in a step because they were not when they came, as no guesses were wanted.
_MOST_BEHIND = 32


class DraftModel:
    """Reads what the larger model reads, and guesses what it will choose.

    It keeps its own keys and values in pages of the same numbers as the larger model's, and chooses tokens by the same
    rules, with the same random numbers: where the two models agree on the odds, they choose the same token. A guess
    that is wrong, or whatever is wrong with these pages, costs time and changes no answer.

    Source: Leviathan et al. 2023, arXiv:2211.17192, section 2.3 (drafts of a smaller model); the shared random numbers are
    the coupling of Daliri et al. 2024, arXiv:2408.07978, section 3.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._known: dict[str, int] = {}  # request -> its tokens that were read, of those in the last step
        self._lost: set[str] = set()  # requests of which it has forgotten what it read
        self._num_failures = 0

    def draft(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of a step with guesses, as many at most as each has room for. Prompts are read."""
        try:
            drafts = self._drafts(rows)
        except Exception:  # noqa: BLE001  a guess is not worth a request
            self._failed(rows)
            return rows
        return [row.with_drafts(drafts.get(row.request_id, ())) for row in rows]

    @property
    def has_given_up(self) -> bool:
        """Whether it failed too often: it is not to be asked any more."""
        return self._num_failures >= _MANY_FAILURES

    def _failed(self, rows: Sequence[Row]) -> None:
        self._num_failures += 1
        self._lost |= {row.request_id for row in rows}
        _log.exception(
            "the draft model failed: %s",
            "it is asked no more" if self.has_given_up else "a step goes without it",
        )
        try:
            self._runner.reset()
        except Exception:  # noqa: BLE001
            self._num_failures = _MANY_FAILURES
            _log.exception("the draft model's cache cannot be made anew: it is asked no more")

    def _drafts(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Guesses for each request that has room for any."""
        reading, behind = [], _MOST_BEHIND
        for row in rows:
            if row.request_id in self._lost:
                continue
            if row.is_prompt:  # it reads what the larger model reads
                reading.append(
                    dataclasses.replace(row, sampling=None, sums=False, adapter_slot=0, constraint=None)
                )
            elif row.draft_room > 0 and (unread := self._unread(row, behind)) is not None:
                reading.append(unread)
                behind -= len(unread.tokens) - 1
        drafts: dict[str, list[int]] = {}
        room = {row.request_id: row.draft_room for row in rows}
        while reading:
            chosen = self._runner.run(reading)
            self._num_failures = 0
            following = []
            for row, of_row in zip(reading, chosen, strict=True):
                self._known[row.request_id] = row.position + len(row.tokens)
                if isinstance(of_row, Sums) or not of_row or of_row[-1].token < 0:
                    continue
                token = of_row[-1].token
                drafts.setdefault(row.request_id, []).append(token)
                if len(drafts[row.request_id]) < room[row.request_id]:
                    position = row.position + len(row.tokens)
                    history = [*row.history, token]
                    following.append(
                        dataclasses.replace(row, tokens=[token], position=position, history=history)
                    )
            reading = following
        ids = {row.request_id for row in rows}
        self._lost &= ids
        self._known = {request_id: n for request_id, n in self._known.items() if request_id in ids}
        return drafts

    def _unread(self, row: Row, behind: int) -> Row | None:
        """What the model has to read before it can guess, or the first part of it; None: none of it in this step.

        Args:
            row: of an answer.
            behind: tokens that may be read beside the newest.
        """
        stop = row.position + len(row.tokens)
        # What it has not read because no guesses were wanted; not what guesses were wrong about.
        known = max(row.num_prompt, min(self._known.get(row.request_id, row.position), row.position))
        part = min(stop, known + behind + 1)
        sampling = _plain(row) if part == stop else None
        unread = dataclasses.replace(
            row, tokens=row.history[known:part], position=known, adapter_slot=0, sampling=sampling
        )
        return unread if part == stop or behind > 0 else None


def _plain(row: Row) -> Sampling | None:
    """How the row's tokens are chosen, without what only its caller wants to know."""
    return None if row.sampling is None else dataclasses.replace(row.sampling, logprobs=None)
