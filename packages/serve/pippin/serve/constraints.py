"""Texts that a request allows: JSON of a schema, a regular expression, choices or a grammar, token by token.

By llguidance, whose limits on the size of grammars and on the work of a step bound what a request can cost.
"""

import json

import llguidance
import llguidance.numpy
import numpy as np

from pippin.core.errors import DataError
from pippin.core.tokenizer import Tokenizer
from pippin.serve.errors import ConstraintError
from pippin.serve.served_model import ConstraintSpec, Grammar, JsonSchema, OneOf, Regex

_MAX_ERROR_CHARS = 300
# How llguidance tells a token that its mask did not allow, for which no grammar is at fault.
_NOT_ALLOWED = "doesn't satisfy the grammar"


class ConstraintCompiler:
    """Makes constraints for the tokens of one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Takes the tokenizer, and how many ids the model has, which may be more than the tokenizer's."""
        eos_ids = sorted(tokenizer.eos_ids)
        if not eos_ids:
            raise DataError(
                "the tokenizer names no token that ends a text, so that no constraint could be completed. Set "
                "eos_token in its tokenizer_config.json."
            )
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_ids[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=eos_ids)

    def __call__(self, spec: ConstraintSpec) -> "MatcherConstraint":
        """A constraint in its initial state.

        Raises:
            DataError: it is none, or takes too much to compile.
        """
        try:
            grammar = _grammar(spec)
        except ValueError as error:
            raise DataError(f"is no JSON schema: {_brief(error)}. Send a JSON object.") from None
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise DataError(f"cannot be compiled: {_brief(matcher.get_error())}. Simplify or correct it.")
        return MatcherConstraint(matcher)


class MatcherConstraint:
    """A constraint on its way; see `pippin.serve.engine.request.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher

    def write_mask(self, allowed: np.ndarray) -> None:
        """Raises ConstraintError where a limit on the work of a step is reached, or nothing is allowed."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, allowed[None])
        self._require_fine()

    def accept(self, token: int) -> bool:
        """Raises ConstraintError where a limit on the work of a step is reached, RuntimeError where the token is not allowed."""
        self._matcher.consume_token(token)
        self._require_fine()
        return self._matcher.is_stopped()

    def copy(self) -> "MatcherConstraint":
        """Another in the same state; what was compiled is shared."""
        return MatcherConstraint(self._matcher.deep_copy())

    def _require_fine(self) -> None:
        if not self._matcher.is_error():
            return
        message = self._matcher.get_error()
        if _NOT_ALLOWED in message:
            raise RuntimeError(message)
        raise ConstraintError(_brief(message))


class _Vocabulary:
    """What llguidance reads of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.eos_ids)
        special = set(self.special_token_ids)
        # A token without text is never a part of one.
        self.tokens = [b"" if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="ignore"))


def _grammar(spec: ConstraintSpec) -> str:
    match spec:
        case JsonSchema(schema):
            # Without bounds on white space, a model may write nothing else.
            return llguidance.LLMatcher.grammar_from_json_schema(
                schema,
                overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        case Regex(pattern):
            return llguidance.LLMatcher.grammar_from_regex(pattern)
        case OneOf(choices):
            return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))
        case Grammar(text):
            return llguidance.LLMatcher.grammar_from_lark(text)


def _brief(error: object) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= _MAX_ERROR_CHARS else text[:_MAX_ERROR_CHARS] + "..."
