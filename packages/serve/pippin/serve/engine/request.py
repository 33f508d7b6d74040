"""What a request asks of the engine, and what it gets back."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class FinishReason(enum.Enum):
    """Why there are no more tokens."""

    STOP = "stop"  # an id or a string that ends the text, or the end of what a constraint allows
    LENGTH = "length"  # as many tokens as were asked for
    CANCELLED = "cancelled"  # by the caller, or because nobody read
    DEADLINE = "deadline"
    CONSTRAINT = "constraint"  # it allows nothing, or takes more work than a step may
    FAILED = "failed"  # the fault of this server
    SHUTDOWN = "shutdown"  # the server stopped first


class Constraint(Protocol):
    """What the text of one request may be. It is asked by the engine's thread only."""

    def write_mask(self, allowed: np.ndarray) -> None:
        """Sets bit `i % 32` of word `i // 32` of an int32 array for each id that may come next.

        Raises:
            ConstraintError: it allows nothing, or takes too much work.
        """
        ...

    def accept(self, token: int) -> bool:
        """Goes on by a token; True where the text is complete and nothing may follow.

        Raises:
            ConstraintError: it takes too much work.
        """
        ...

    def copy(self) -> "Constraint":
        """Another of the same text, in the same state."""
        ...


MAX_LOGPROBS = 20  # the most tokens whose log-probabilities are told beside that of the chosen one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, in the order of the fields. All were checked by who made it."""

    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # id -> what its logit gains
    repetition_penalty: float = (
        1.0  # divides positive logits of tokens in prompt or output, multiplies others
    )
    frequency_penalty: float = 0.0  # taken from a logit for each time that the output holds the token
    presence_penalty: float = 0.0  # taken once
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # of the most likely token's probability
    seed: int = 0  # the same seed gives the same tokens, whatever else the server does
    logprobs: int | None = (
        None  # how many of the most likely tokens are told with each; None: none, nor its own
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A loaded adapter."""

    name: str
    slot: int  # where the runner has it, from 1
    loading: int  # a number that no other loading has, of this or another adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue."""

    request_id: str
    prompt: tuple[int, ...]  # at least one id
    max_tokens: int  # of output, at least 1, but with `sums`
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()  # end the text and are left out of it
    stop_strings: tuple[str, ...] = ()  # end the text and are left out of it
    priority: int = 0  # higher is served earlier
    tenant: str = ""  # who gets a fair share
    cache_salt: str = ""  # requests share cached prefixes only with those of the same tenant and salt
    deadline: float | None = None  # seconds on the engine's clock
    constraint: Constraint | None = None
    adapter: Adapter | None = None  # None: the base model
    text: bool = True  # whether text is wanted, beside ids
    # Wants the sum of the prompt's hidden states, and no tokens: max_tokens is 0. It finds no cached prefix: what is
    # cached are keys and values.
    sums: bool = False
    trace: "Trace | None" = None

    @property
    def num_tokens(self) -> int:
        """Of prompt and output, at most."""
        return len(self.prompt) + self.max_tokens


# In the place of a token, where there is none.
NO_TOKEN = -1  # the logits are not finite
CONSTRAINT_FAILED = -2  # with a ConstraintError


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A token that was chosen."""

    token: int
    logprob: float | None = None  # of the model's own distribution, before temperature and what follows it
    top: tuple[tuple[int, float], ...] = ()  # the most likely ids and their log-probabilities


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of the hidden states of a row's tokens, of parts that are the same whatever else is in the step, in order."""

    parts: Sequence[np.ndarray]  # [D] each


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already
    output_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Output:
    """What is new of a request. The last one of a request, and only that, has a finish reason."""

    request_id: str
    text: str = ""
    tokens: tuple[Sampled, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None  # the string or the id that ended the text
    usage: Usage = Usage()  # so far
    sums: np.ndarray | None = None  # [D], float64: where the request wanted it, and FinishReason.STOP


@dataclasses.dataclass(frozen=True)
class Timing:
    """When things happened to a request that ended, in seconds on the engine's clock."""

    arrived: float
    scheduled: float | None  # its first step began
    first_token: float | None
    finished: float


class Trace(Protocol):
    """Who follows a call, which may have several requests, from elsewhere through this server."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    def finish(self, output: Output, timing: Timing) -> None:
        """One of its requests ended; in the engine's thread."""

    def fail(self, reason: str) -> None:
        """It ended before all its requests were taken."""


class Observer(Protocol):
    """Who is told what the engine does, in the engine's thread: metrics, traces."""

    def on_finish(self, request: Request, output: Output, timing: Timing) -> None:
        """A request ended."""

    def on_step(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """A step was computed."""

    def on_tokens(self, seconds: Sequence[float]) -> None:
        """Requests got a token after these times since their last one."""

    def on_first_token(self, request: Request, seconds: float) -> None:
        """A request got its first token, so long after it came."""
