"""Observers and the log of requests."""

import json
import logging

import pytest

from pippin.serve.engine.request import FinishReason, Output, Request, Sampled, Timing, Usage
from pippin.serve.observers import JsonFormatter, Observers, RequestLog

_REQUEST = Request(request_id="r1", prompt=(7, 8), max_tokens=3, tenant="ann", stop_strings=("secret",))
_OUTPUT = Output("r1", "confidential", (Sampled(9),), FinishReason.STOP, "secret", Usage(2, 1, 3))
_TIMING = Timing(arrived=10.0, scheduled=10.5, first_token=10.75, finished=12.0)


class Heard:
    """Keeps what it is told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_each_observer_is_told_everything():
    heard = [Heard(), Heard()]
    observers = Observers(heard)
    observers.on_finish(_REQUEST, _OUTPUT, _TIMING)
    observers.on_step(5, 2, 0.1)
    observers.on_tokens([0.1, 0.2])
    observers.on_first_token(_REQUEST, 0.3)
    assert heard[0].calls == heard[1].calls
    assert heard[0].calls[1:] == [
        ("on_step", 5, 2, 0.1),
        ("on_tokens", [0.1, 0.2]),
        ("on_first_token", _REQUEST, 0.3),
    ]


@pytest.fixture
def record(caplog):
    with caplog.at_level(logging.INFO):
        RequestLog().on_finish(_REQUEST, _OUTPUT, _TIMING)
    return caplog.records[0]


def test_a_request_that_ended_is_a_line(record):
    assert record.getMessage() == (
        "request request_id=r1 tenant=ann finish_reason=stop prompt_tokens=2 cached_tokens=1 output_tokens=3 "
        "queue_s=0.5 first_token_s=0.75 total_s=2.0"
    )


def test_in_json_each_fact_is_a_field(record):
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["request_id"], line["first_token_s"]) == ("INFO", "r1", 0.75)


def test_nothing_that_was_said_is_logged(record):
    line = JsonFormatter().format(record)
    assert "confidential" not in line and "secret" not in line


def test_a_request_that_was_never_served_has_no_times_of_it(caplog):
    with caplog.at_level(logging.INFO):
        RequestLog().on_finish(_REQUEST, _OUTPUT, Timing(10.0, None, None, 12.0))
    assert "queue_s" not in caplog.messages[0] and "total_s=2.0" in caplog.messages[0]


def test_an_exception_stays_on_the_line():
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord(
            "n", logging.ERROR, "p", 1, "failed %s", ("so",), __import__("sys").exc_info()
        )
    text = JsonFormatter().format(record)
    assert "\n" not in text and json.loads(text)["message"] == "failed so"
    assert "ValueError: no" in json.loads(text)["exception"]
