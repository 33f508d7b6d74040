"""A request as the server takes it from any protocol, checked field by field."""

import dataclasses

from pippin.serve.engine.request import Sampling
from pippin.serve.served_model import ConstraintSpec, Message


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """A prompt that is encoded already."""

    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation, of which the model has the next turn."""

    messages: tuple[Message, ...]


Prompt = str | TokenIds | Chat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What to continue, and how. The seed in `sampling` is the first completion's."""

    request_id: str
    prompt: Prompt  # not empty
    prompt_field: str = "text"  # what errors of the prompt name
    max_tokens: int | None = None  # None: as many as fit
    n: int = 1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()  # beside the model's own
    ignore_eos: bool = False
    constraint: ConstraintSpec | None = None
    constraint_field: str = "json_schema"
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None  # None: the base model
    timeout_s: float | None = None
    embeds: bool = False  # wants a vector of the prompt, and no text
