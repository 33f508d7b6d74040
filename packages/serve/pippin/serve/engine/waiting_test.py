"""The queue's order: fair between tenants, urgent first within one."""

import dataclasses

from pippin.serve.engine.waiting import WaitingQueue


@dataclasses.dataclass(frozen=True)
class Waiter:
    tenant: str
    urgency: tuple[float, int]
    num_waiting_tokens: int = 10


def make_queue(*waiters):
    queue = WaitingQueue()
    for waiter in waiters:
        queue.enter(waiter)
    return queue


def serve(queue):
    waiter = queue.next()
    queue.remove(waiter)
    queue.charge(waiter.tenant, waiter.num_waiting_tokens)
    return waiter


def test_tenants_take_turns_whoever_came_first():
    queue = make_queue(*(Waiter("a", (0.0, i)) for i in range(4)), *(Waiter("b", (9.0, i)) for i in range(2)))
    assert "".join(serve(queue).tenant for _ in range(6)) == "ababaa"


def test_turns_are_counted_in_tokens():
    big, small = (Waiter("a", (0.0, i), 30) for i in range(3)), (Waiter("b", (0.0, i), 10) for i in range(6))
    queue = make_queue(*big, *small)
    assert "".join(serve(queue).tenant for _ in range(8)) == "abbbabbb"


def test_who_was_away_has_no_claim_to_what_it_missed():
    queue = make_queue(*(Waiter("a", (0.0, i)) for i in range(10)))
    for _ in range(5):
        serve(queue)
    for i in range(5):
        queue.enter(Waiter("b", (1.0, i)))
    assert "".join(serve(queue).tenant for _ in range(6)) == "ababab"


def test_a_tenant_is_forgotten_when_its_last_request_ends():
    queue = make_queue(Waiter("a", (0.0, 1)))
    assert queue.num_tenants == 1
    queue.leave(serve(queue))
    assert (queue.num_tenants, len(queue), queue.num_tokens) == (0, 0, 0)
    assert queue.next() is None


def test_the_urgent_of_a_tenant_come_first():
    late, early = Waiter("a", (5.0, 1)), Waiter("a", (1.0, 2))
    queue = make_queue(late, early)
    assert [*queue] == [early, late]
    assert queue.num_tokens == 20
    assert [serve(queue), serve(queue)] == [early, late]
