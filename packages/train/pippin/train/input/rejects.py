"""What was read of a text and what could not be used: counted by kind, and named by file and line."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Any

from pippin.core.errors import DataError


class Defect(StrEnum):
    """Why input was not used."""

    EMPTY = "empty"
    INVALID_UTF8 = "invalid UTF-8"
    BROKEN_JSON = "broken JSON"
    MISSING_FIELD = "missing field"
    NOT_TEXT = "field is not text"
    TOO_LONG = "line too long"
    DAMAGED = "damaged file"


_KEPT = 20  # rejects that a report remembers; all of them are counted and listed in the file
_NAMED = 3  # of those, how many its text names


@dataclasses.dataclass
class ReadReport:
    """Counts of what was read, and of what was not used and why."""

    documents: int = 0
    bytes: int = 0  # of UTF-8, of the documents
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)  # kind of defect -> count
    examples: list[str] = dataclasses.field(
        default_factory=list
    )  # the first rejects: "file:line: defect: detail"

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ReadReport:
        """The report of `to_json`."""
        return cls(**value)

    def text(self, listing: str | None = None) -> str:
        """One line, one more for each of the first rejects, and one that says how many there are beyond them.

        Args:
            listing: the file that names all of them, told where the text does not.
        """
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rejected.items())) or "none"
        head = f"{self.documents} document{'' if self.documents == 1 else 's'}, {self.bytes / 1e6:.1f} MB; rejected: {counts}"
        named = self.examples[:_NAMED]
        lines = [head, *(f"  {example}" for example in named)]
        if more := sum(self.rejected.values()) - len(named):
            lines.append(f"  and {more} more" + (f"; all are named in {listing}" if listing else ""))
        return "\n".join(lines)


class Rejects:
    """Takes the documents and the rejects of one pass over a source.

    Args:
        fatal: whether the first reject raises `DataError`.
        listing: a file that gets one line for each reject, as they come.
    """

    def __init__(self, *, fatal: bool = False, listing: Path | None = None):
        self.report = ReadReport()
        self.failure: Exception | None = None  # what ended the pass, where it cannot be raised at once
        self._fatal = fatal
        self._listing = open(listing, "w", encoding="utf-8") if listing else None  # noqa: SIM115

    def document(self, size: int) -> None:
        """Counts a document, or the `size` bytes of its first part."""
        self.report.documents += 1
        self.report.bytes += size

    def more(self, size: int) -> None:
        """Counts bytes of another part of the last document."""
        self.report.bytes += size

    def reject(self, defect: Defect, file: Path, place: int | None, detail: str) -> None:
        """Counts and names something that is not used; `place` is a line or row, from 1.

        Raises:
            DataError: the policy is that no input may be lost.
        """
        where = f"{file}:{place}" if place is not None else str(file)
        line = f"{where}: {defect}: {detail}"
        if self._fatal:
            raise DataError(
                f"{line}. Mend or remove it, or set bad_input=skip to count such input and go on."
            )
        self.report.rejected[defect] = self.report.rejected.get(defect, 0) + 1
        if len(self.report.examples) < _KEPT:
            self.report.examples.append(line)
        if self._listing:
            self._listing.write(line + "\n")
            self._listing.flush()

    def close(self) -> None:
        """Closes the listing."""
        if self._listing:
            self._listing.close()
