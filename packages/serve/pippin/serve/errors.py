"""Why a request is not taken. Nothing of it was done."""

import dataclasses
from collections.abc import Sequence

from pippin.core.errors import PippinError
from pippin.serve.engine.request import FinishReason


class RequestError(PippinError):
    """A request that this server could never serve; `field` is its path in the request."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class QueueFullError(PippinError):
    """Too much waits already."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DuplicateError(PippinError):
    """A request with this id is being served."""


class DrainingError(PippinError):
    """The server takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Violation:
    """A rule that a request breaks: `field` is a path such as `requests[0].stop[2]`."""

    field: str
    description: str


class InvalidRequestError(PippinError):
    """A request that breaks rules, all of them told."""

    def __init__(self, violations: Sequence[Violation]):
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


class UnsupportedError(PippinError):
    """Something that this server cannot do."""


class NotFoundError(PippinError):
    """Something that is asked for by name, and is not here."""


class PreconditionError(PippinError):
    """Something that cannot be done as things stand; who asks has to change them first."""


class SlowReaderError(PippinError):
    """A caller who does not read what comes."""


class ConstraintError(PippinError):
    """What a request allows is nothing, or takes too much work to find out."""


class UnfinishedError(PippinError):
    """A completion ended without the end of its text."""

    def __init__(self, reason: FinishReason):
        super().__init__(f"a completion ended with {reason.value}")
        self.reason = reason


def let_go(error: BaseException) -> None:
    """Frees what the frames of an error that was told hold, and of those that it came from: a request, which may be large.

    Where a context manager raised another error, or grpc keeps the one of `abort`, frames and errors hold each other
    until the garbage collector comes by, which counts objects and not bytes.
    """
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
