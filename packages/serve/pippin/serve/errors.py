"""Why a request is not taken. Nothing of it was done."""

from pippin.core.errors import PippinError


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
