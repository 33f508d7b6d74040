"""From what `--model` names to what is served: weights, tokenizer, chat template, cache, and compiled programs."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.chat_template import ChatTemplate, load_chat_template
from pippin.core.compilation_cache import keep_compiled_programs
from pippin.core.errors import CheckpointError, ConfigError, DataError
from pippin.core.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_object
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.model_files import open_model
from pippin.layers.named_models import find_model
from pippin.serve.constraints import ConstraintCompiler
from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.engine.scheduler import Limits
from pippin.serve.form import Form
from pippin.serve.placement import tensor_parallel, with_key_heads
from pippin.serve.runner import ModelRunner, page_bytes
from pippin.serve.served_model import Message, ServedModel

_log = logging.getLogger(__name__)

# What `bazel run //packages/train:launch` trains where nothing else is asked for, and where it writes.
_DEFAULT_RUNS = "runs/stdlib_tiny*"
_RUN_FILE = "trainer.textproto"
# Programs for a model's steps take longer, those that choose tokens do not always: both are waited for at the start.
_LEAST_COMPILE_S = 0.1
# Of a model whose files do not tell how long its texts may be.
_CONTEXT = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model may take of the machine."""

    cache_bytes: int = 1 << 30  # of keys and values
    max_context: int | None = None  # tokens; None: what the model's files say
    max_requests: int = 32  # served at a time
    chunk_tokens: int = 128  # of prompts in a step
    max_drafts: int = 4  # guesses of an answer's next tokens in a step
    tensor_parallel: int = 1  # devices that share the model
    int8_weights: bool = False
    int8_cache: bool = False


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that is ready, in an engine that was not started."""

    engine: Engine
    served: ServedModel


def find(name_or_path: str | None, directory: Path = Path()) -> Path:
    """Where the model lies that a user means.

    Args:
        name_or_path: as typed; None: the newest run of the default recipe.
        directory: where that is looked for.

    Raises:
        CheckpointError: there is none, and what to do.
    """
    if name_or_path is not None:
        return find_model(name_or_path)
    runs = [path.parent for path in directory.glob(f"{_DEFAULT_RUNS}/{_RUN_FILE}")]
    if not runs:
        raise CheckpointError(
            f"there is no model to serve: {directory.absolute()} holds no run of the default recipe "
            f"({_DEFAULT_RUNS}). Train one with `bazel run //packages/train:launch`, or give --model."
        )
    return max(runs, key=lambda run: run.stat().st_mtime)


def open_served(path: Path, sizes: Sizes, queue: QueueLimits, name: str | None = None) -> OpenedModel:
    """The model at a path, with all its programs compiled; logs where the time went.

    Raises:
        PippinError: it is no model, or one that cannot be served, or it does not fit.
    """
    clock = _Clock()
    keep_compiled_programs(least_s=_LEAST_COMPILE_S)
    bundle = open_model(path)
    cfg = bundle.component
    if not isinstance(cfg, CausalLMConfig):
        raise CheckpointError(
            f"{path} holds a {type(cfg).__name__}, which is no language model. Give another."
        )
    tokenizer = None if bundle.tokenizer is None else load_tokenizer(bundle.tokenizer)
    cfg, params = _in_served_dtype(cfg, bundle.params())
    clock.log("weights and tokenizer")
    placement = tensor_parallel(sizes.tensor_parallel, cfg) if sizes.tensor_parallel > 1 else None
    form = Form(placement, sizes.int8_weights, sizes.int8_cache)
    limits = _limits(with_key_heads(cfg, sizes.tensor_parallel), _context(bundle, sizes), sizes)
    runner = ModelRunner(cfg, params, limits, form)
    clock.log(f"cache of {limits.num_pages * limits.page_size} tokens")
    runner.warm_up(lambda shape, s: _log.info("programs for %d rows of %d tokens: %.1f s", *shape, s))
    clock.log("all programs")
    served = _served(name or path.absolute().name, cfg, tokenizer, bundle, limits)
    floats = cfg.activation_dtype.value
    served = dataclasses.replace(
        served,
        weights_dtype="int8" if sizes.int8_weights else floats,
        cache_dtype="int8" if sizes.int8_cache else floats,
        num_devices=sizes.tensor_parallel,
    )
    token_bytes = tokenizer.token_bytes if tokenizer else _no_bytes
    _log.info("%s: %d tokens of context, %d at a time", served.name, limits.max_context, limits.max_requests)
    return OpenedModel(Engine(runner, limits, token_bytes, queue=queue), served)


def _served(
    name: str, cfg: CausalLMConfig, tokenizer: Tokenizer | None, bundle: Bundle, limits: Limits
) -> ServedModel:
    assert isinstance(cfg.vocab_size, int)
    model = ServedModel(name=name, vocab_size=cfg.vocab_size, context_length=limits.max_context)
    if tokenizer is None or bundle.tokenizer is None:
        _log.warning("%s has no tokenizer: it takes and gives token ids only", name)
        return model
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{bundle.directory}: the tokenizer has {tokenizer.vocab_size} tokens and the model {cfg.vocab_size}. "
            "Take both from one model."
        )
    start = tokenizer.start_ids
    template = load_chat_template(bundle.tokenizer, tokenizer)
    try:
        constraints: ConstraintCompiler | None = ConstraintCompiler(tokenizer, cfg.vocab_size)
    except DataError as error:
        _log.warning("%s takes no constraints: %s", name, error)
        constraints = None
    return dataclasses.replace(
        model,
        stop_ids=tokenizer.eos_ids,
        encode=lambda text: [*start, *tokenizer.encode(text)],
        encode_chat=None if template is None else _chat(template),
        compile_constraint=constraints,
    )


def _chat(template: ChatTemplate) -> Callable[[Sequence[Message]], Sequence[int]]:
    return lambda messages: template.encode([{"role": m.role, "content": m.content} for m in messages])


def _context(bundle: Bundle, sizes: Sizes) -> int:
    """The longest text, in tokens."""
    if sizes.max_context is not None:
        return sizes.max_context
    told = read_tokenizer_object(bundle.tokenizer / "config.json") if bundle.tokenizer else {}
    longest = told.get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest > 0 else _CONTEXT


def _limits(cfg: CausalLMConfig, context: int, sizes: Sizes) -> Limits:
    limits = Limits(
        num_pages=1,
        max_requests=sizes.max_requests,
        chunk_tokens=sizes.chunk_tokens,
        max_drafts=sizes.max_drafts,
    )
    of_page = page_bytes(cfg, limits.page_size, int8=sizes.int8_cache)
    num_pages = sizes.cache_bytes // of_page if of_page else -(-context // limits.page_size)
    if num_pages * limits.page_size < min(context, limits.chunk_tokens):
        raise ConfigError(
            f"a cache of {sizes.cache_bytes >> 20} MiB holds {num_pages * limits.page_size} tokens of this model; at "
            f"least {min(context, limits.chunk_tokens)} are needed. Set --cache-mib to "
            f"{-(-limits.chunk_tokens * of_page // limits.page_size >> 20)} or more."
        )
    # No more than all requests can fill.
    most = sizes.max_requests * -(-context // limits.page_size)
    return dataclasses.replace(limits, num_pages=min(num_pages, most), longest=context)


def _in_served_dtype(cfg: CausalLMConfig, params: Mapping[str, Any]) -> tuple[CausalLMConfig, dict[str, Any]]:
    """On CPUs all in float32, which is the fastest there; elsewhere weights in the dtype of activations."""
    if jax.default_backend() == "cpu":
        cfg = cfg.set(activation_dtype=FloatType.FLOAT32)
    dtype = jax.numpy.dtype(cfg.activation_dtype.value)

    def cast(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype, copy=False) if jax.numpy.issubdtype(values.dtype, np.floating) else values

    return cfg, jax.tree.map(cast, dict(params))


def _no_bytes(token: int) -> bytes:
    return b""


class _Clock:
    """Says how long each part of the start took."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def log(self, what: str) -> None:
        now = time.monotonic()
        _log.info("%s: %.1f s", what, now - self._last)
        self._last = now
