import logging

import pytest
from google.rpc import code_pb2, error_details_pb2

from pippin.core.errors import DataError
from pippin.serve import errors
from pippin.serve.engine.request import FinishReason
from pippin.serve.rpc.status import status_of

CODES = {
    errors.RequestError("text", "is wrong"): (code_pb2.INVALID_ARGUMENT, {"ErrorInfo", "BadRequest"}),
    errors.InvalidRequestError([errors.Violation("n", "is wrong")]): (
        code_pb2.INVALID_ARGUMENT,
        {"ErrorInfo", "BadRequest"},
    ),
    errors.QueueFullError("is full", 2.5): (
        code_pb2.RESOURCE_EXHAUSTED,
        {"ErrorInfo", "QuotaFailure", "RetryInfo"},
    ),
    errors.SlowReaderError("too slow"): (code_pb2.RESOURCE_EXHAUSTED, {"ErrorInfo"}),
    errors.DuplicateError("twice"): (code_pb2.ALREADY_EXISTS, {"ErrorInfo"}),
    errors.DrainingError("stops"): (code_pb2.UNAVAILABLE, {"ErrorInfo", "RetryInfo"}),
    errors.UnsupportedError("no"): (code_pb2.UNIMPLEMENTED, {"ErrorInfo"}),
    errors.NotFoundError("no"): (code_pb2.NOT_FOUND, {"ErrorInfo"}),
    errors.UnfinishedError(FinishReason.CANCELLED): (code_pb2.CANCELLED, {"ErrorInfo"}),
    errors.UnfinishedError(FinishReason.DEADLINE): (code_pb2.DEADLINE_EXCEEDED, {"ErrorInfo"}),
    errors.UnfinishedError(FinishReason.CONSTRAINT): (code_pb2.INVALID_ARGUMENT, {"ErrorInfo", "BadRequest"}),
    errors.UnfinishedError(FinishReason.FAILED): (code_pb2.INTERNAL, {"ErrorInfo"}),
    errors.UnfinishedError(FinishReason.SHUTDOWN): (code_pb2.UNAVAILABLE, {"ErrorInfo", "RetryInfo"}),
}


@pytest.mark.parametrize("error", CODES, ids=lambda e: f"{type(e).__name__} {e}")
def test_each_kind_of_error_has_its_code_and_details(error):
    status = status_of(error)
    code, details = CODES[error]
    assert status.code == code
    assert {packed.TypeName().removeprefix("google.rpc.") for packed in status.details} == details


def test_the_hint_when_to_come_again_is_the_queues():
    info = error_details_pb2.RetryInfo()
    assert [d.Unpack(info) for d in status_of(errors.QueueFullError("is full", 2.5)).details].count(True) == 1
    assert info.retry_delay.ToTimedelta().total_seconds() == 2.5


@pytest.mark.parametrize("error", [KeyError("a secret"), DataError("a secret path"), OSError("a secret")])
def test_other_errors_are_told_as_an_id_only(error, caplog):
    with caplog.at_level(logging.ERROR):
        status = status_of(error)
    assert status.code == code_pb2.INTERNAL and "secret" not in str(status)
    assert status.message.split()[-1].rstrip(".") in caplog.text


def test_every_way_not_to_finish_is_in_the_table():
    for reason in set(FinishReason) - {FinishReason.STOP, FinishReason.LENGTH}:
        assert status_of(errors.UnfinishedError(reason)).message
