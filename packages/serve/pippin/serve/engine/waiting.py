"""Who is served next: the tenant that got least, and of its requests the most urgent."""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Protocol


class Waiter(Protocol):
    """What waits."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...

    @property
    def urgency(self) -> tuple[float, int]:
        """Smaller is served earlier; no two are equal."""
        ...

    @property
    def num_waiting_tokens(self) -> int:
        """What it has to be computed before its next token."""
        ...


@dataclasses.dataclass
class _Tenant[T]:
    served: float = 0.0  # tokens, less what a tenant without requests did not ask for
    active: int = 0  # requests that wait or are being served
    waiting: list[T] = dataclasses.field(default_factory=list)  # by urgency


class WaitingQueue[T: Waiter]:
    """Requests that wait, in a fair order.

    Tenants get equal numbers of tokens as long as each asks for some; who was away has no claim to what it missed.
    Priorities order the requests of one tenant: they take nothing from another.

    Source: Sheng et al. 2024, arXiv:2401.00588, section 4 (the virtual token counter).
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return sum(len(t.waiting) for t in self._tenants.values())

    def __iter__(self) -> Iterator[T]:
        return (waiter for t in self._tenants.values() for waiter in t.waiting)

    @property
    def num_tenants(self) -> int:
        """Those with a request that waits or is served."""
        return len(self._tenants)

    def enter(self, waiter: T) -> None:
        """Counts a new request as its tenant's, and puts it into the queue."""
        tenant = self._tenants.get(waiter.tenant)
        if tenant is None:
            least = min((t.served for t in self._tenants.values()), default=0.0)
            tenant = self._tenants[waiter.tenant] = _Tenant(least)
        tenant.active += 1
        self.put_back(waiter)

    def leave(self, waiter: T) -> None:
        """Counts a request as ended, which is in the queue no more."""
        tenant = self._tenants[waiter.tenant]
        tenant.active -= 1
        if tenant.active == 0:
            del self._tenants[waiter.tenant]

    def put_back(self, waiter: T) -> None:
        """Puts a request into the queue that was taken out before it ended."""
        bisect.insort(self._tenants[waiter.tenant].waiting, waiter, key=lambda w: w.urgency)
        self.num_tokens += waiter.num_waiting_tokens

    def remove(self, waiter: T) -> None:
        """Takes a request out of the queue."""
        self._tenants[waiter.tenant].waiting.remove(waiter)
        self.num_tokens -= waiter.num_waiting_tokens

    def next(self) -> T | None:
        """The one to serve next, which stays in the queue."""
        waiting = [
            (t.served, t.waiting[0].urgency, t.waiting[0]) for t in self._tenants.values() if t.waiting
        ]
        return min(waiting, key=lambda entry: entry[:2])[2] if waiting else None

    def waiting(self, tenant: str) -> tuple[int, int]:
        """How many requests of a tenant wait, and their tokens."""
        waiting = self._tenants[tenant].waiting if tenant in self._tenants else []
        return len(waiting), sum(waiter.num_waiting_tokens for waiter in waiting)

    def served(self, tenant: str) -> float:
        """What a tenant got, in tokens; only differences between tenants mean something."""
        return self._tenants[tenant].served

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Counts tokens that were computed for a tenant."""
        self._tenants[tenant].served += num_tokens
