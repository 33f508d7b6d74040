"""What one request may ask for."""

import dataclasses

from pippin.core.errors import ConfigError
from pippin.serve.engine.request import MAX_LOGPROBS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Upper ends of what a request says; the model's context is another."""

    max_tokens: int = 8192  # of output, of each completion
    max_n: int = 16  # completions
    max_messages: int = 1024  # of a conversation
    max_violations: int = 32  # told of one request
    max_prompt_bytes: int = 1 << 20  # of text; tokenizing it holds a thread
    max_stop: int = 16  # texts, and ids likewise
    max_stop_bytes: int = 256  # of each text: as much may be held back from the stream
    max_logit_bias: int = 300  # entries
    max_logprobs: int = MAX_LOGPROBS  # of the most likely tokens; no more are computed
    # Of one answer, all requests of a batch together. A message that tells them is smaller than clients of gRPC take (4 MiB).
    max_logprob_values: int = 1 << 18
    max_choices: int = 256  # of a constraint
    max_constraint_bytes: int = 64 << 10
    max_batch: int = 64  # requests, and completions, of one GenerateBatch
    max_timeout_s: float = 3600.0  # no request is served for longer
    slow_reader_timeout_s: float = 30.0  # a caller who takes nothing for so long is not served on
    max_pending_tokens: int = 16384  # that a caller has not taken yet, of one request
    max_encoding: int = 64  # texts that are tokenized or wait for it

    def __post_init__(self) -> None:
        if self.max_logprobs > MAX_LOGPROBS:
            raise ConfigError(
                f"max_logprobs is {self.max_logprobs}; no more than {MAX_LOGPROBS} are computed."
            )
