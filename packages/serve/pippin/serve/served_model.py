"""What the server has to know of a model, beside how to compute it."""

import dataclasses
from collections.abc import Callable, Sequence

from pippin.serve.adapters import Adapters
from pippin.serve.engine.request import Constraint


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """JSON that a schema allows."""

    schema: str


@dataclasses.dataclass(frozen=True)
class Regex:
    """A text that matches as a whole."""

    pattern: str


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A text of a context-free grammar, in Lark's notation."""

    text: str


ConstraintSpec = JsonSchema | Regex | OneOf | Grammar


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model's name, sizes and text. The functions are called in threads, several at a time.

    They raise a PippinError, whose text the caller of the server is told, where what they get is at fault.
    """

    name: str
    vocab_size: int
    context_length: int  # tokens of prompt and output
    weights_dtype: str = "float32"  # of linear maps
    cache_dtype: str = "float32"  # of keys and values
    num_devices: int = 1  # that share it
    stop_ids: frozenset[int] = frozenset()  # that end a text
    # The ids of a text, with what the model wants before each; None: there is no tokenizer.
    encode: Callable[[str], Sequence[int]] | None = None
    # The ids of a conversation and of the start of the model's answer; None: it has no chat template.
    encode_chat: Callable[[Sequence[Message]], Sequence[int]] | None = None
    compile_constraint: Callable[[ConstraintSpec], Constraint] | None = None
    adapters: Adapters | None = None  # None: it takes none
    # Reads the model's files anew, and gives what makes them the ones that are served: that is called between two
    # steps. None: it cannot.
    read_anew: Callable[[], Callable[[], None]] | None = None
