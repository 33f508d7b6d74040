"""The one table of how a call may end that is not OK."""

import asyncio
import datetime
import logging
import secrets
from collections.abc import Sequence
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

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
    Violation,
)

_log = logging.getLogger(__name__)

_DOMAIN = "pippin"
# Many clients refuse trailers of more than 8 KB; the details are sent in base 64, beside the message.
_MAX_DETAIL_BYTES, _MAX_DESCRIPTION, _MAX_MESSAGE = 3000, 400, 500

# A kind of error -> code, and the reason in ErrorInfo.
_ERRORS: dict[type[Exception], tuple[int, str]] = {
    RequestError: (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST"),
    InvalidRequestError: (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST"),
    QueueFullError: (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    SlowReaderError: (code_pb2.RESOURCE_EXHAUSTED, "SLOW_READER"),
    DuplicateError: (code_pb2.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID"),
    DrainingError: (code_pb2.UNAVAILABLE, "DRAINING"),
    UnsupportedError: (code_pb2.UNIMPLEMENTED, "UNSUPPORTED"),
    PreconditionError: (code_pb2.FAILED_PRECONDITION, "PRECONDITION"),
    NotFoundError: (code_pb2.NOT_FOUND, "NOT_FOUND"),
}

# Why a completion ended, where that is no success -> code, reason.
_FINISHES: dict[FinishReason, tuple[int, str]] = {
    FinishReason.CANCELLED: (code_pb2.CANCELLED, "CANCELLED"),
    FinishReason.DEADLINE: (code_pb2.DEADLINE_EXCEEDED, "DEADLINE"),
    FinishReason.CONSTRAINT: (code_pb2.INVALID_ARGUMENT, "CONSTRAINT"),
    FinishReason.FAILED: (code_pb2.INTERNAL, "ENGINE"),
    FinishReason.SHUTDOWN: (code_pb2.UNAVAILABLE, "SHUTDOWN"),
}


def status_of(error: Exception) -> status_pb2.Status:
    """What the caller is told of an error.

    Only a PippinError was written for callers: of any other they get an id, under which the log has it.
    """
    if isinstance(error, UnfinishedError):
        (code, reason), message = _FINISHES[error.reason], MESSAGES[error.reason]
    elif type(error) in _ERRORS:
        (code, reason), message = _ERRORS[type(error)], str(error)
        if isinstance(error, RequestError):
            message = f"{error.field}: {message}"
    else:
        error_id = secrets.token_hex(8)
        _log.error("error %s", error_id, exc_info=error)
        code, reason = code_pb2.INTERNAL, "INTERNAL"
        message = f"The server failed. Its log has the reason under {error_id}."
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN), *_details(error)]
    return _status(code, message, details)


async def abort_with(context: grpc.aio.ServicerContext, status: status_pb2.Status) -> NoReturn:
    """Ends a call; as cancelled where the client has gone, and nobody can be told."""
    end = rpc_status.to_status(status)
    try:
        await context.abort(end.code, end.details, end.trailing_metadata)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError("the client has gone") from None
    raise AssertionError("abort raises")


def denied(code: int, reason: str, message: str) -> status_pb2.Status:
    """The end of a call whose caller may not make it."""
    return _status(code, message, [error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN)])


def _status(code: int, message: str, details: Sequence[Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=message[:_MAX_MESSAGE])
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: Exception) -> list[Message]:
    if isinstance(error, RequestError):
        return [_bad_request([Violation(error.field, str(error))])]
    if isinstance(error, InvalidRequestError):
        return [_bad_request(error.violations)]
    if isinstance(error, QueueFullError):
        violation = error_details_pb2.QuotaFailure.Violation(subject="queue", description=str(error))
        return [error_details_pb2.QuotaFailure(violations=[violation]), _retry(error.retry_after_s)]
    reason = error.reason if isinstance(error, UnfinishedError) else None
    if reason is FinishReason.CONSTRAINT:
        return [_bad_request([Violation("constraint", MESSAGES[reason])])]
    if reason is FinishReason.SHUTDOWN or isinstance(error, DrainingError):
        return [_retry(RETRY_STOPPING_S)]
    return []


def _bad_request(violations: Sequence[Violation]) -> Message:
    """The first of them, as many as fit."""
    found = error_details_pb2.BadRequest()
    for violation in violations:
        one = found.field_violations.add(
            field=violation.field[:_MAX_DESCRIPTION], description=violation.description[:_MAX_DESCRIPTION]
        )
        if found.ByteSize() > _MAX_DETAIL_BYTES:
            found.field_violations.remove(one)
            break
    return found


def _retry(seconds: float) -> Message:
    delay = duration_pb2.Duration()
    delay.FromTimedelta(datetime.timedelta(seconds=seconds))
    return error_details_pb2.RetryInfo(retry_delay=delay)
