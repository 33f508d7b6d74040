"""From what `--model` names to what is served: weights, tokenizer, chat template, cache, and compiled programs."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.chat_template import ChatTemplate, load_chat_template
from pippin.core.compilation_cache import keep_compiled_programs
from pippin.core.errors import CheckpointError, ConfigError, DataError
from pippin.core.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_object, tokenizer_digest
from pippin.layers.adapter import model_signature
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.model_files import open_model
from pippin.layers.named_models import find_model
from pippin.serve.adapter_slots import AdapterSlots
from pippin.serve.adapters import Adapters
from pippin.serve.backend import Backend
from pippin.serve.constraints import ConstraintCompiler
from pippin.serve.engine.draft_model import DraftModel
from pippin.serve.engine.engine import Engine, QueueLimits
from pippin.serve.engine.scheduler import Limits
from pippin.serve.form import AdapterRoom, Form
from pippin.serve.placement import tensor_parallel, with_key_heads
from pippin.serve.reload import Reader
from pippin.serve.runner import ModelRunner, Shape, page_bytes
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
class AdapterSource:
    """Where adapters are registered, and how many and how large they may be."""

    directory: Path
    count: int
    rank: int

    def __post_init__(self) -> None:
        if not self.directory.is_dir():
            raise ConfigError(
                f"--adapters {self.directory} is no directory. Give the one whose sub-directories are adapters."
            )


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


def open_served(
    path: Path,
    sizes: Sizes,
    queue: QueueLimits,
    name: str | None = None,
    adapters: AdapterSource | None = None,
    draft: Path | None = None,
) -> Backend:
    """The model at a path, with all its programs compiled; logs where the time went.

    Args:
        path: of the model.
        sizes: what it may take of the machine.
        queue: what may wait.
        name: as clients are told; None: that of the path.
        adapters: those that may be loaded.
        draft: the path of a smaller model with the same tokens, which guesses what this one will say.

    Raises:
        PippinError: it is no model, or one that cannot be served, or it does not fit.
    """
    clock = _Clock()
    keep_compiled_programs(least_s=_LEAST_COMPILE_S)
    bundle, cfg = _open(path)
    tokenizer = None if bundle.tokenizer is None else load_tokenizer(bundle.tokenizer)
    stored, params = cfg, bundle.params()
    signature = "" if adapters is None else model_signature(params)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    cfg, cast = _in_served_dtype(cfg)
    params = cast(params)
    clock.log("weights and tokenizer")
    smaller = None if draft is None else _open_draft(draft, bundle, cfg)
    placement = tensor_parallel(sizes.tensor_parallel, cfg) if sizes.tensor_parallel > 1 else None
    room = None if adapters is None else AdapterRoom(adapters.count, adapters.rank)
    form = Form(placement, sizes.int8_weights, sizes.int8_cache, room)
    cached = [with_key_heads(cfg, sizes.tensor_parallel), *([] if smaller is None else [smaller[0]])]
    limits = _limits(cached, _context(bundle, sizes), sizes)
    runner = ModelRunner(cfg, params, limits, form)
    del params  # the runner has its own, in another order
    clock.log(f"cache of {limits.num_pages * limits.page_size} tokens")
    runner.warm_up(_log_program)
    draft_model = None
    if smaller is not None:
        draft_runner = ModelRunner(*smaller, limits, Form(int8_cache=sizes.int8_cache))
        draft_runner.warm_up()
        draft_model = DraftModel(draft_runner)
    clock.log("all programs")
    served = _served(name or path.absolute().name, cfg, tokenizer, bundle, limits)
    slots = None
    if adapters is not None:
        slots = AdapterSlots(runner, stored, shapes, signature)
        served = dataclasses.replace(served, adapters=Adapters(adapters.directory, slots, served.name))
    floats = cfg.activation_dtype.value
    served = dataclasses.replace(
        served,
        weights_dtype="int8" if sizes.int8_weights else floats,
        cache_dtype="int8" if sizes.int8_cache else floats,
        num_devices=sizes.tensor_parallel,
    )
    token_bytes = tokenizer.token_bytes if tokenizer else _no_bytes
    _log.info("%s: %d tokens of context, %d at a time", served.name, limits.max_context, limits.max_requests)
    served = dataclasses.replace(served, read_anew=Reader(path, bundle, runner, cast, slots))
    engine = Engine(runner, limits, token_bytes, draft_model=draft_model, queue=queue)
    return Backend(engine, served)


def _open(path: Path) -> tuple[Bundle, CausalLMConfig]:
    """The language model at a path."""
    bundle = open_model(path)
    if not isinstance(bundle.component, CausalLMConfig):
        raise CheckpointError(
            f"{path} holds a {type(bundle.component).__name__}, which is no language model. Give another."
        )
    return bundle, bundle.component


def _open_draft(
    path: Path, larger: Bundle, larger_cfg: CausalLMConfig
) -> tuple[CausalLMConfig, dict[str, Any]]:
    """A model that guesses what a larger one will say, and its parameters."""
    bundle, cfg = _open(path)
    digests = [tokenizer_digest(b.tokenizer) if b.tokenizer else None for b in (bundle, larger)]
    if digests[0] != digests[1] or cfg.vocab_size != larger_cfg.vocab_size:
        raise CheckpointError(
            f"--draft-model {path} has other tokens than {larger.directory}, so its guesses would be of other text. "
            "Give a model with the same tokenizer and vocab_size."
        )
    cfg, cast = _in_served_dtype(cfg)
    return cfg, cast(bundle.params())


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


def _limits(cfgs: Sequence[CausalLMConfig], context: int, sizes: Sizes) -> Limits:
    """`cfgs`: of the models whose keys and values are kept."""
    limits = Limits(
        num_pages=1,
        max_requests=sizes.max_requests,
        chunk_tokens=sizes.chunk_tokens,
        max_drafts=sizes.max_drafts,
    )
    of_page = sum(page_bytes(cfg, limits.page_size, int8=sizes.int8_cache) for cfg in cfgs)
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


def _in_served_dtype(cfg: CausalLMConfig) -> tuple[CausalLMConfig, Callable[[Any], Any]]:
    """The config, and what casts its parameters.

    On CPUs all in float32, which is the fastest there; elsewhere weights in the dtype of activations.
    """
    if jax.default_backend() == "cpu":
        cfg = cfg.set(activation_dtype=FloatType.FLOAT32)
    dtype = jax.numpy.dtype(cfg.activation_dtype.value)

    def cast(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype, copy=False) if jax.numpy.issubdtype(values.dtype, np.floating) else values

    return cfg, lambda params: jax.tree.map(cast, dict(params))


def _log_program(shape: Shape, seconds: float) -> None:
    kind = ", with adapters" if shape.with_adapters else ""
    _log.info("programs for %d rows of %d tokens%s: %.1f s", shape.rows, shape.tokens, kind, seconds)


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
