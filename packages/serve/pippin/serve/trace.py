"""The W3C trace that a request is a part of, where nothing is told of it but its id in the log."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from pippin.serve.call import Call
from pippin.serve.engine.request import Output, Timing, Trace

# Of a request that comes, in any protocol.
_HEADERS = ("traceparent", "tracestate")
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

# The trace of a call, by what `trace_headers` found; None: nobody follows it.
BeginTrace = Callable[[Call, Mapping[str, str]], Trace | None]


@dataclasses.dataclass(frozen=True)
class NotedTrace:
    """A trace of the caller's (`Trace`)."""

    trace_id: str

    def finish(self, output: Output, timing: Timing) -> None:
        """Nothing: nobody is told."""

    def fail(self, reason: str) -> None:
        """Nothing: nobody is told."""


def trace_headers(headers: Iterable[tuple[str, str | bytes]]) -> Mapping[str, str]:
    """Of the headers, or metadata, of a request: those that name its trace."""
    found = ((name.lower(), value) for name, value in headers)
    return {name: value for name, value in found if name in _HEADERS and isinstance(value, str)}


def note_trace(call: Call, headers: Mapping[str, str]) -> Trace | None:
    """The id of a call's trace (`BeginTrace`).

    Source: W3C Trace Context, section 3.2 (traceparent).
    """
    found = _PARENT.fullmatch(headers.get("traceparent", ""))
    return NotedTrace(found[1]) if found else None
