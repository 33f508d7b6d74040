"""The one table of how a request over HTTP may end that is not answered, in the form of OpenAI's errors."""

import logging
import math
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from pippin.core.errors import PippinError
from pippin.serve.endings import MESSAGES, RETRY_STOPPING_S
from pippin.serve.engine.request import FinishReason
from pippin.serve.errors import (
    DrainingError,
    DuplicateError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    QueueFullError,
    RequestError,
    SlowReaderError,
    UnfinishedError,
    UnsupportedError,
)

_log = logging.getLogger(__name__)

_MAX_MESSAGE = 2000
# Status -> OpenAI's `type`.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}

# A kind of error -> status, and OpenAI's `code`.
_ERRORS: dict[type[Exception], tuple[int, str]] = {
    RequestError: (400, "invalid_value"),
    InvalidRequestError: (400, "invalid_value"),
    UnsupportedError: (400, "unsupported"),
    PreconditionError: (409, "precondition"),
    NotFoundError: (404, "not_found"),
    DuplicateError: (409, "duplicate_request_id"),
    QueueFullError: (429, "queue_full"),
    SlowReaderError: (408, "slow_reader"),
    DrainingError: (503, "draining"),
}

# Why a completion ended, where that is no success -> status, code.
_FINISHES: dict[FinishReason, tuple[int, str]] = {
    FinishReason.CANCELLED: (499, "cancelled"),
    FinishReason.DEADLINE: (504, "deadline"),
    FinishReason.CONSTRAINT: (400, "constraint"),
    FinishReason.FAILED: (500, "engine"),
    FinishReason.SHUTDOWN: (503, "shutdown"),
}


class Problem(PippinError):
    """What a caller is told: a status, a text, and which field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": _whole_characters(str(self)[:_MAX_MESSAGE]),
                "type": kind,
                "param": None if self.param is None else _whole_characters(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


class TooLargeProblem(Problem):
    """A body that is too large; what is left of it is not read."""

    def __init__(self, most: int):
        super().__init__(
            413,
            f"The body is larger than {most} bytes. Shorten it.",
            code="too_large",
            headers={"connection": "close"},
        )


def problem_of(error: Exception) -> Problem:
    """What the caller is told of an error.

    Only a PippinError was written for callers: of any other they get an id, under which the log has it.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):  # of the router: no such path, or method
        return Problem(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, UnfinishedError):
        (status, code), message = _FINISHES[error.reason], MESSAGES[error.reason]
        stops = error.reason is FinishReason.SHUTDOWN
        return Problem(status, message, code=code, headers=_retry_after(RETRY_STOPPING_S) if stops else None)
    if type(error) not in _ERRORS:
        error_id = secrets.token_hex(8)
        _log.error("error %s", error_id, exc_info=error)
        return Problem(
            500, f"The server failed. Its log has the reason under {error_id}.", code="internal_error"
        )
    status, code = _ERRORS[type(error)]
    if isinstance(error, InvalidRequestError):
        return Problem(status, str(error), param=error.violations[0].field, code=code)
    if isinstance(error, RequestError):
        return Problem(status, f"{error.field}: {error}", param=error.field, code=code)
    headers = None
    if isinstance(error, QueueFullError):
        headers = _retry_after(error.retry_after_s)
    elif isinstance(error, DrainingError):
        headers = _retry_after(RETRY_STOPPING_S)
    return Problem(status, str(error), code=code, headers=headers)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(math.ceil(seconds))}


def _whole_characters(text: str) -> str:
    """A text that can be sent: a field's name may hold half a character, which JSON can spell."""
    return text.encode(errors="backslashreplace").decode()
