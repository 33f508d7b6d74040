"""The engine with a runner whose answers are known: outputs, limits, deadlines, cancellation, failures, the end."""

import dataclasses
import queue
import threading
import time

import numpy as np
import pytest

from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.engine.request import CONSTRAINT_FAILED, FinishReason, Request, Sampled
from pippin.serve.engine.scheduler import Limits
from pippin.serve.engine.testing import FakeRunner, answer, hidden, token_bytes
from pippin.serve.errors import (
    ConstraintError,
    DrainingError,
    DuplicateError,
    PreconditionError,
    QueueFullError,
    RequestError,
)

LIMITS = Limits(num_pages=32, page_size=4, max_requests=4, chunk_tokens=16, row_tokens=4)


class Clock:
    """Time that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Caller:
    """A caller of the engine that keeps all outputs."""

    def __init__(self):
        self.outputs = queue.Queue()

    def __call__(self, output):
        self.outputs.put(output)

    def wait(self):
        """All outputs, up to the last one."""
        outputs = []
        while not outputs or outputs[-1].finish_reason is None:
            outputs.append(self.outputs.get(timeout=20))
        assert self.outputs.empty(), "there is an output behind the last one"
        return outputs


@pytest.fixture
def make_engine(request):
    def make(limits=LIMITS, **kwargs):
        runner = FakeRunner(limits)
        engine = Engine(runner, limits, token_bytes, **kwargs)
        engine.start()

        def end():
            runner.hold.set()
            engine.stop(0)
            assert engine.load().used_pages == 0

        request.addfinalizer(end)
        return engine, runner

    return make


def submit(engine, request_id="r", prompt=b"hello", max_tokens=6, **kwargs):
    caller = Caller()
    request = Request(request_id=request_id, prompt=tuple(prompt), max_tokens=max_tokens, **kwargs)
    engine.submit(request, caller)
    return caller


def text(outputs):
    return "".join(output.text for output in outputs)


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.002)


def test_a_request_is_answered(make_engine):
    engine, _ = make_engine()
    outputs = submit(engine).wait()
    assert text(outputs) == bytes(answer(b"hello", 6)).decode()
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert [s.token for o in outputs for s in o.tokens] == answer(b"hello", 6)
    usage = outputs[-1].usage
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (5, 6, 0)


def test_many_requests_get_the_answers_that_each_gets_alone(make_engine):
    engine, _ = make_engine()
    callers = {i: submit(engine, str(i), b"prompt %02d" % i * (i % 3 + 1), 8) for i in range(30)}
    for i, caller in callers.items():
        assert text(caller.wait()) == bytes(answer(b"prompt %02d" % i * (i % 3 + 1), 8)).decode()


def test_a_stop_string_ends_the_text_before_it(make_engine):
    engine, _ = make_engine()
    whole = bytes(answer(b"hello", 20)).decode()
    outputs = submit(engine, max_tokens=20, stop_strings=(whole[5:8],)).wait()
    assert text(outputs) == whole[: whole.index(whole[5:8])]
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == (FinishReason.STOP, whole[5:8])


def test_a_stop_id_ends_the_text_and_is_left_out(make_engine):
    engine, _ = make_engine()
    whole = answer(b"hello", 20)
    outputs = submit(engine, max_tokens=20, stop_ids=frozenset({whole[4]})).wait()
    assert [s.token for o in outputs for s in o.tokens] == whole[: whole.index(whole[4])]
    assert outputs[-1].matched_stop == whole[4]


def test_a_full_queue_refuses_with_when_to_come_again(make_engine):
    engine, runner = make_engine(queue=QueueLimits(max_waiting=2))
    runner.hold.clear()
    callers = [submit(engine, "0")]
    wait_for(lambda: engine.load().num_running == 1)
    callers += [submit(engine, "1"), submit(engine, "2")]
    with pytest.raises(QueueFullError, match="2 requests wait already, and 15 tokens are") as caught:
        submit(engine, "3")
    assert 1 <= caught.value.retry_after_s <= 60
    runner.hold.set()
    for caller in callers:
        assert caller.wait()[-1].finish_reason is FinishReason.LENGTH


def test_the_queue_is_limited_in_tokens_too(make_engine):
    engine, runner = make_engine(queue=QueueLimits(max_waiting_tokens=12))
    runner.hold.clear()
    callers = [submit(engine, "0", b"x" * 20)]  # there is no other: it is taken
    with pytest.raises(QueueFullError, match="20 tokens are to be computed first"):
        submit(engine, "1", b"x")
    wait_for(lambda: engine.load().num_running == 1)
    with pytest.raises(QueueFullError, match="0 requests wait already, and 20 tokens"):
        submit(engine, "1", b"x")  # its prompt is not computed yet
    runner.hold.set()
    callers[0].wait()
    callers += [submit(engine, "1", b"x" * 8)]
    callers[1].wait()


def test_what_can_never_be_served_is_refused(make_engine):
    engine, _ = make_engine()
    with pytest.raises(RequestError, match="120 tokens and max_tokens is 9.* more than 128") as caught:
        submit(engine, prompt=b"x" * 120, max_tokens=9)
    assert caught.value.field == "max_tokens"


def test_an_id_is_served_once_at_a_time(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    first = submit(engine, "same")
    with pytest.raises(DuplicateError, match="'same' is being served"):
        submit(engine, "same")
    runner.hold.set()
    first.wait()
    assert submit(engine, "same").wait()


def test_cancelling_frees_the_pages_before_the_next_step(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    caller = submit(engine)
    wait_for(lambda: engine.load().used_pages == 2)
    engine.cancel("r")
    assert engine.load().used_pages == 0
    engine.cancel("r")  # again: nothing happens
    runner.hold.set()
    assert [o.finish_reason for o in caller.wait()] == [FinishReason.CANCELLED]


def test_deadlines_end_requests_that_wait_and_that_are_served(make_engine):
    clock = Clock()
    engine, runner = make_engine(limits=Limits(num_pages=8, page_size=4, max_requests=1), clock=clock)
    runner.hold.clear()
    served = submit(engine, "served", deadline=105.0)
    wait_for(lambda: engine.load().num_running == 1)
    waiting = submit(engine, "waiting", deadline=104.0)
    patient = submit(engine, "patient", deadline=500.0)
    clock.now = 110.0
    runner.hold.set()
    assert served.wait()[-1].finish_reason is FinishReason.DEADLINE
    assert [o.finish_reason for o in waiting.wait()] == [FinishReason.DEADLINE]
    assert patient.wait()[-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_breaks_its_step_fails_alone(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    runner.broken.add("bad")
    callers = {name: submit(engine, name, name.encode() * 5) for name in ("good", "bad", "fine", "last")}
    runner.hold.set()
    assert callers.pop("bad").wait()[-1].finish_reason is FinishReason.FAILED
    for name, caller in callers.items():
        assert text(caller.wait()) == bytes(answer(name.encode() * 5, 6)).decode()
    assert text(submit(engine, "after").wait()) == bytes(answer(b"hello", 6)).decode()


@pytest.mark.parametrize("bad", [{"7"}, {"0", "15"}, {str(i) for i in range(16)}])
def test_those_that_break_a_step_of_many_are_found_in_few_steps(make_engine, bad):
    limits = Limits(num_pages=128, page_size=4, max_requests=16, chunk_tokens=128, row_tokens=4)
    engine, runner = make_engine(limits)
    runner.hold.clear()
    callers = {str(i): submit(engine, str(i), b"prompt %02d" % i, max_tokens=3) for i in range(16)}
    runner.broken |= bad
    runner.hold.set()
    for name, caller in callers.items():
        outputs = caller.wait()
        if name in bad:
            assert outputs[-1].finish_reason is FinishReason.FAILED
        else:
            assert text(outputs) == bytes(answer(b"prompt %02d" % int(name), 3)).decode()
    failed = [step for step in runner.steps if runner.broken & {row.request_id for row in step}]
    assert len(failed) <= 2 + 4 * len(bad)


def test_nobody_is_told_anything_while_the_engine_is_locked(make_engine):
    """Who is told may write a log, and a log may block."""
    seen = []

    class Looking:
        def __getattr__(self, name):
            return lambda *_: seen.append((name, not engine._lock._is_owned()))

    engine, runner = make_engine(observer=Looking())
    runner.broken.add("bad")
    for name in ("bad", "good"):
        submit(engine, name).wait()
    wait_for(lambda: len(seen) >= 10)
    assert {name for name, _ in seen} >= {"on_finish", "on_first_token", "on_step", "on_tokens"}
    assert all(free for _, free in seen)


def test_an_id_that_was_cancelled_in_a_step_may_be_used_again_at_once(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    first = submit(engine)
    wait_for(lambda: engine.load().num_running == 1)
    engine.cancel("r")
    second = submit(engine, prompt=b"another")
    runner.hold.set()
    assert [o.finish_reason for o in first.wait()] == [FinishReason.CANCELLED]
    assert text(second.wait()) == bytes(answer(b"another", 6)).decode()


def test_an_engine_that_is_itself_at_fault_starts_over(make_engine, monkeypatch):
    engine, runner = make_engine()
    runner.hold.clear()
    callers = [submit(engine, str(i)) for i in range(3)]
    wait_for(lambda: engine.load().num_running == 3)

    def fail(*_):
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patch:
        patch.setattr("pippin.serve.engine.scheduler.Scheduler.update", fail)
        runner.hold.set()
        for caller in callers:
            assert caller.wait()[-1].finish_reason is FinishReason.FAILED
    assert text(submit(engine).wait()) == bytes(answer(b"hello", 6)).decode()


def test_who_fills_the_queue_leaves_a_place_for_others(make_engine):
    engine, runner = make_engine(queue=QueueLimits(max_waiting=6))
    runner.hold.clear()
    submit(engine, "first", tenant="a")
    wait_for(lambda: engine.load().num_running == 1)
    for i in range(6):
        submit(engine, f"a{i}", tenant="a")
    with pytest.raises(QueueFullError):
        submit(engine, "more", tenant="a")
    callers = [submit(engine, f"b{i}", tenant="b") for i in range(2)]
    with pytest.raises(QueueFullError):
        submit(engine, "b2", tenant="b")
    runner.hold.set()
    for caller in callers:
        assert caller.wait()[-1].finish_reason is FinishReason.LENGTH


def test_a_cache_that_cannot_be_made_is_tried_again_and_health_says_so(make_engine, monkeypatch):
    monkeypatch.setattr("pippin.serve.engine.engine._RESET_AGAIN_S", 0.01)
    engine, runner = make_engine()
    there_is_room = threading.Event()
    reset = runner.reset

    def fail():
        if not there_is_room.is_set():
            raise MemoryError
        reset()

    runner.reset = fail
    runner.broken.add("bad")
    bad = submit(engine, "bad")
    wait_for(lambda: engine.load().stalled)
    there_is_room.set()
    assert bad.wait()[-1].finish_reason is FinishReason.FAILED
    assert submit(engine, "good").wait()[-1].finish_reason is FinishReason.LENGTH
    assert not engine.load().stalled


def test_steps_that_always_fail_are_not_taken_for_progress(make_engine):
    engine, runner = make_engine()
    for i in range(64):
        assert not engine.load().stalled
        runner.broken.add(str(i))
        assert submit(engine, str(i)).wait()[-1].finish_reason is FinishReason.FAILED
    assert engine.load().stalled
    assert submit(engine, "good").wait()[-1].finish_reason is FinishReason.LENGTH
    assert not engine.load().stalled


class _Faulty:
    def __getattr__(self, name):
        def fail(*_):
            raise RuntimeError(f"{name} is at fault")

        return fail


def test_what_an_observer_does_wrong_is_no_requests_fault(make_engine):
    engine, _ = make_engine(observer=_Faulty())
    assert text(submit(engine).wait()) == bytes(answer(b"hello", 6)).decode()


class _Broken:
    def write_mask(self, allowed):
        raise NotImplementedError

    def accept(self, token):
        raise RuntimeError("a constraint at fault")


def test_a_constraint_that_fails_ends_its_own_request(make_engine):
    engine, _ = make_engine()
    bad, good = submit(engine, "bad", constraint=_Broken()), submit(engine, "good")
    assert bad.wait()[-1].finish_reason is FinishReason.FAILED
    assert good.wait()[-1].finish_reason is FinishReason.LENGTH


class _TooMuch(_Broken):
    def accept(self, token):
        raise ConstraintError("too many items")


def test_a_constraint_that_takes_too_much_ends_its_own_request_as_such(make_engine, caplog):
    engine, runner = make_engine()
    bad, good = submit(engine, "bad", constraint=_TooMuch()), submit(engine, "good")
    assert bad.wait()[-1].finish_reason is FinishReason.CONSTRAINT
    assert good.wait()[-1].finish_reason is FinishReason.LENGTH
    runner.run = lambda rows: [[Sampled(CONSTRAINT_FAILED)] for _ in rows]
    assert submit(engine, "next", constraint=_Broken()).wait()[-1].finish_reason is FinishReason.CONSTRAINT
    assert "request bad failed: too many items" in caplog.text and "Traceback" not in caplog.text


def test_an_engine_that_stands_still_says_so(make_engine):
    clock = Clock()
    engine, runner = make_engine(clock=clock, queue=QueueLimits(stall_s=30))
    clock.now += 1000
    assert not engine.load().stalled  # it has nothing to do
    runner.hold.clear()
    caller = submit(engine)
    wait_for(lambda: engine.load().num_running == 1)
    clock.now += 29
    assert not engine.load().stalled
    clock.now += 2
    assert engine.load().stalled
    runner.hold.set()
    caller.wait()
    wait_for(lambda: not engine.load().stalled)


def test_draining_finishes_what_was_taken(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    callers = [submit(engine, str(i)) for i in range(8)]
    engine.drain()
    with pytest.raises(DrainingError, match="about to stop"):
        submit(engine, "late")
    threading.Timer(0.05, runner.hold.set).start()
    engine.stop(20)
    for caller in callers:
        assert caller.wait()[-1].finish_reason is FinishReason.LENGTH


def test_what_is_left_after_the_grace_is_told(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    caller = submit(engine)
    threading.Timer(0.05, runner.hold.set).start()
    engine.stop(0)
    assert caller.wait()[-1].finish_reason is FinishReason.SHUTDOWN


def _sum(text):
    return np.sum([hidden(token) for token in text], axis=0, dtype=np.float64)


def test_sums_are_of_the_whole_prompt_whatever_is_cached_and_served_beside(make_engine):
    engine, _ = make_engine(dataclasses.replace(LIMITS, num_pages=20))
    submit(engine, "known", b"a text that is known " * 2, 2).wait()
    others = [submit(engine, str(i), b"prompt %02d" % i * 4, 12) for i in range(6)]
    asked = {"e1": b"a text that is known " * 2, "e2": b"x", "e3": b"a longer one " * 5}
    callers = {name: submit(engine, name, text, 0, sums=True, text=False) for name, text in asked.items()}
    for name, caller in callers.items():
        (output,) = caller.wait()
        assert output.finish_reason is FinishReason.STOP
        np.testing.assert_array_equal(output.sums, _sum(asked[name]))
        assert (output.usage.prompt_tokens, output.usage.output_tokens) == (len(asked[name]), 0)
    for i, caller in enumerate(others):
        assert text(caller.wait()) == bytes(answer(b"prompt %02d" % i * 4, 12)).decode()


def test_sums_have_deadlines_and_bounds_and_fail_alone(make_engine):
    clock = Clock()
    engine, runner = make_engine(clock=clock)
    runner.hold.clear()
    late = submit(engine, "late", b"x" * 100, 0, sums=True, deadline=105.0)
    wait_for(lambda: engine.load().num_running == 1)
    runner.broken.add("bad")
    bad = submit(engine, "bad", b"x" * 60, 0, sums=True)
    good = submit(engine, "good", b"y" * 60, 0, sums=True)
    clock.now = 110.0
    runner.hold.set()
    assert late.wait()[-1].finish_reason is FinishReason.DEADLINE
    assert bad.wait()[-1].finish_reason is FinishReason.FAILED
    np.testing.assert_array_equal(good.wait()[-1].sums, _sum(b"y" * 60))
    with pytest.raises(RequestError):
        submit(engine, "long", b"x" * 129, 0, sums=True)


def test_sums_that_are_not_finite_fail(make_engine, monkeypatch):
    monkeypatch.setattr("pippin.serve.engine.testing.hidden", lambda token: np.array([1.0, np.nan]))
    engine, _ = make_engine()
    assert submit(engine, "e", b"x", 0, sums=True).wait()[-1].finish_reason is FinishReason.FAILED


def test_a_change_waits_for_those_that_have_begun_and_comes_before_those_that_wait(make_engine):
    engine, runner = make_engine(dataclasses.replace(LIMITS, max_requests=2, num_pages=16))
    runner.hold.clear()
    begun = {name: submit(engine, name, name.encode(), 20) for name in ("a", "b")}
    wait_for(lambda: engine.load().num_running == 2)
    waiting = submit(engine, "c", b"a", 20)
    done = engine.exchange(lambda: setattr(runner, "letters", 3))
    with pytest.raises(PreconditionError, match="waits for requests to end already"):
        engine.exchange(lambda: None)
    runner.hold.set()
    assert done.result(20) is None
    for name, caller in begun.items():
        assert text(caller.wait()) == bytes(answer(name.encode(), 20)).decode()
    assert text(waiting.wait()) == bytes(answer(b"a", 20, letters=3)).decode()
    engine.exchange(lambda: setattr(runner, "letters", 4)).result(20)  # and again, while nothing is served
    assert text(submit(engine, "d", b"a", 20).wait()) == bytes(answer(b"a", 20, letters=4)).decode()


def test_one_that_gave_up_its_turn_ends_before_a_change(make_engine):
    engine, runner = make_engine(dataclasses.replace(LIMITS, num_pages=14, max_requests=4))
    callers = {}
    runner.hold.clear()
    for name in ("a", "b", "c"):
        callers[name] = submit(engine, name, name.encode() * 12, 16)
        wait_for(lambda: engine.load().num_running + engine.load().num_waiting == len(callers))
    wait_for(lambda: engine.load().num_running >= 1)
    runner.hold.set()
    wait_for(lambda: engine.load().preemptions > 0 or not engine.load().num_running)
    done = engine.exchange(lambda: setattr(runner, "letters", 2))
    new = submit(engine, "new", b"x", 8)
    done.result(20)
    for name, caller in callers.items():
        assert text(caller.wait()) == bytes(answer(name.encode() * 12, 16)).decode()
    assert text(new.wait()) == bytes(answer(b"x", 8, letters=2)).decode()


def test_no_prefix_of_before_a_change_is_used_after_it(make_engine):
    engine, runner = make_engine()
    prompt = b"a text that is known"
    submit(engine, "1", prompt, 2).wait()
    engine.exchange(lambda: setattr(runner, "letters", 3)).result(20)
    outputs = submit(engine, "2", prompt, 2).wait()
    assert outputs[-1].usage.cached_tokens == 0
    assert submit(engine, "3", prompt, 2).wait()[-1].usage.cached_tokens == 16


def test_a_change_that_fails_is_told_and_all_goes_on(make_engine):
    engine, _ = make_engine()

    def fail():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        engine.exchange(fail).result(20)
    assert text(submit(engine).wait()) == bytes(answer(b"hello", 6)).decode()
    engine.exchange(lambda: None).result(20)


def test_a_change_that_is_withdrawn_is_not_made_and_all_goes_on(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    begun = submit(engine, "begun", b"a", 20)
    wait_for(lambda: engine.load().num_running == 1)
    done = engine.exchange(lambda: setattr(runner, "letters", 3))
    late = submit(engine, "late", b"b", 4)
    assert done.cancel()
    runner.hold.set()
    assert text(late.wait()) == bytes(answer(b"b", 4)).decode()
    assert text(begun.wait()) == bytes(answer(b"a", 20)).decode()
    engine.exchange(lambda: setattr(runner, "letters", 2)).result(20)  # the next one is made
    assert runner.letters == 2


def test_a_change_that_has_begun_is_not_withdrawn(make_engine):
    engine, _ = make_engine()
    begun, go_on = threading.Event(), threading.Event()

    def change():
        begun.set()
        assert go_on.wait(20)

    done = engine.exchange(change)
    assert begun.wait(20) and not done.cancel()
    go_on.set()
    assert done.result(20) is None
    submit(engine).wait()


def test_a_change_ends_with_the_engine(make_engine):
    engine, runner = make_engine()
    runner.hold.clear()
    caller = submit(engine)
    wait_for(lambda: engine.load().num_running == 1)
    done = engine.exchange(lambda: None)
    threading.Timer(0.05, runner.hold.set).start()
    engine.stop(0)
    assert done.cancelled() or done.done()
    assert caller.wait()[-1].finish_reason in (FinishReason.SHUTDOWN, FinishReason.LENGTH)
    with pytest.raises(DrainingError):
        engine.exchange(lambda: None)


class _Observer:
    def __init__(self):
        self.finished, self.steps, self.first, self.gaps = [], [], [], []

    def on_finish(self, request, output, timing):
        self.finished.append((request.request_id, output.finish_reason, timing))

    def on_step(self, num_tokens, num_requests, seconds):
        self.steps.append((num_tokens, num_requests))

    def on_tokens(self, seconds):
        self.gaps += seconds

    def on_first_token(self, request, seconds):
        self.first.append(request.request_id)


def test_an_observer_is_told_all(make_engine):
    observer = _Observer()
    engine, _ = make_engine(observer=observer)
    submit(engine).wait()
    wait_for(lambda: len(observer.gaps) == 5)
    assert observer.steps == [(5, 1), *[(1, 1)] * 5]
    assert observer.first == ["r"]
    ((request_id, reason, timing),) = observer.finished
    assert (request_id, reason) == ("r", FinishReason.LENGTH)
    assert timing.arrived <= timing.scheduled <= timing.first_token <= timing.finished
