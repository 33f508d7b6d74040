"""The picture of an engine: what it says of what happened lately."""

import dataclasses
import io

from rich.console import Console

from pippin.serve.engine.engine import Load
from pippin.serve.engine.request import FinishReason, Output, Request, Timing
from pippin.serve.top import Top

_LOAD = Load(
    num_running=3,
    num_waiting=2,
    waiting_tokens=1234,
    used_pages=10,
    num_pages=64,
    steps=77,
    preemptions=1,
    prefix_queries=200,
    prefix_hits=50,
    draining=False,
    stalled=False,
)
_REQUEST = Request(request_id="r", prompt=(1,), max_tokens=1)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make_top(load=_LOAD):
    clock = Clock()
    return Top("apple", 8, lambda: load, clock), clock


def text(top):
    console = Console(file=io.StringIO(), width=120)
    console.print(top.picture())
    return console.file.getvalue()


def lines(top):
    """The first and the second column."""
    cells = (line.split("  ") for line in text(top).splitlines())
    rows = ([cell.strip() for cell in row if cell.strip()] for row in cells)
    return {row[0]: row[1] for row in rows if len(row) > 1}


def test_the_load_is_told():
    found = lines(make_top()[0])
    assert (found["running"], found["waiting"], found["pages"]) == ("3", "2", "10 of 64")
    assert (found["known prefixes"], found["gave up turns"]) == ("25%", "1")


def test_what_happened_lately_is_told_and_what_is_longer_ago_is_not():
    top, clock = make_top()
    top.on_first_token(_REQUEST, 0.4)
    top.on_tokens([0.01] * 50 + [0.03] * 49)
    top.on_step(50, 3, 0.02)
    top.on_finish(_REQUEST, Output("r", finish_reason=FinishReason.STOP), Timing(0, 0, 0, 0))
    found = lines(top)
    assert found["output"] == "10.0 tokens/s"
    assert (found["first token"], found["between tokens"], found["step"]) == (
        "400, 400 ms",
        "10, 30 ms",
        "20, 20 ms",
    )
    assert "1 stop" in text(top)
    clock.now += 60
    found = lines(top)
    assert (found["output"], found["between tokens"]) == ("0.0 tokens/s", "-")


def test_the_state_is_in_the_title():

    assert "apple (ready)" in text(make_top()[0])
    assert "(draining)" in text(make_top(dataclasses.replace(_LOAD, draining=True))[0])
    assert "(stalled)" in text(make_top(dataclasses.replace(_LOAD, draining=True, stalled=True))[0])


def test_it_is_drawn_until_it_is_stopped():
    top, _ = make_top()
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    top.start(console)
    top.stop()
    assert "apple" in console.file.getvalue()
