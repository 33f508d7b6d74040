"""What the TPUs' compiler says of the programs that serve a model: their memory, what devices send, and their time."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import Target
from pippin.core.hardware.memory import shard_bytes
from pippin.core.hardware.profile import Profile, read_profile
from pippin.core.hardware.topology import topology
from pippin.layers.causal_lm_config import CausalLMConfig, FloatType
from pippin.layers.kernel_select import record_choices
from pippin.serve.engine.scheduler import Limits
from pippin.serve.form import Form
from pippin.serve.placement import tensor_parallel
from pippin.serve.runner import Shape, lower_step

_GIB, _MS = 2**30, 1e3
# What libtpu says of a program that does not fit: what it needs, arguments included.
_TOO_LARGE = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of")
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a step. Bytes and seconds are of one device."""

    rows: int
    tokens: int  # a row
    temporary_bytes: float
    profile: Profile | None  # None: it does not fit
    parameter_bytes: float
    attention_bytes: float  # keys and values that all rows read where every text is of full length
    memory_bandwidth: float

    @property
    def memory_s(self) -> float:
        """Parameters, keys and values, read once at the full speed of the memory: no step is faster."""
        return (self.parameter_bytes + self.attention_bytes) / self.memory_bandwidth

    @property
    def compute_s(self) -> float:
        """The longer of that, and of the compiler's estimate, which leaves attention's kernel out, with its reads."""
        compiled = self.profile.compiled_s if self.profile else math.nan
        return max(self.memory_s, compiled + self.attention_bytes / self.memory_bandwidth)

    @property
    def sent_bytes(self) -> float:
        """By all transfers."""
        return math.fsum(c.sent_bytes for c in self.profile.collectives) if self.profile else math.nan

    @property
    def step_s(self) -> float:
        """Computing, and then all transfers at full speed: none is hidden."""
        return self.compute_s + (self.profile.link_s if self.profile else math.nan)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The programs of a model on one target. Bytes are of one device."""

    target: Target
    parameter_bytes: float
    cache_bytes: float
    cache_tokens: int
    kernels: tuple[str, ...]  # of attention
    programs: Sequence[Program]

    @property
    def used_bytes(self) -> float:
        """Parameters, cache, and what the program needs that needs most."""
        return self.parameter_bytes + self.cache_bytes + max(p.temporary_bytes for p in self.programs)

    @property
    def fits(self) -> bool:
        """Whether all has a place in the memory."""
        return all(p.profile for p in self.programs) and self.used_bytes <= self.target.device.memory_bytes


def estimate(
    cfg: CausalLMConfig, limits: Limits, target: Target, int8_weights: bool = False, int8_cache: bool = False
) -> Estimate:
    """Compiles the largest program of answers and the largest of prompts, in bfloat16, shared by all devices of a target.

    Raises:
        ConfigError: there is no compiler for it.
        ShardingError: so many devices cannot share the model.
    """
    goal = topology(target, "serve")
    cfg = cfg.set(activation_dtype=FloatType.BFLOAT16)
    placement = tensor_parallel(target.num_devices, cfg, goal.devices)
    form = Form(placement, int8_weights, int8_cache)
    programs: list[Program] = []
    kernels: dict[str, None] = {}
    parameter_bytes = cache_bytes = 0.0
    for shape in (
        Shape(limits.answer_rows[-1], 1),
        Shape(limits.chunk_tokens // limits.row_tokens, limits.row_tokens),
    ):
        with record_choices() as choices:
            lowered = lower_step(cfg, limits, form, shape)
        kernels |= dict.fromkeys(choice.kernel for choice in choices)
        parameter_bytes, cache_bytes = shard_bytes(lowered.params), shard_bytes(lowered.cache)
        temporary, text = _compiled(lowered.program, target, parameter_bytes + cache_bytes)
        mesh = dict(placement.mesh.shape)
        programs.append(
            Program(
                shape.rows,
                shape.tokens,
                temporary_bytes=temporary,
                profile=None if text is None else read_profile(text, mesh, target.device),
                parameter_bytes=parameter_bytes,
                # Each row of a program reads all keys of its text, once.
                attention_bytes=cache_bytes * min(1.0, shape.rows / limits.max_requests),
                memory_bandwidth=target.device.memory_bandwidth,
            )
        )
    return Estimate(
        target,
        parameter_bytes,
        cache_bytes,
        limits.num_pages * limits.page_size,
        tuple(kernels),
        programs,
    )


def _compiled(lowered: jax.stages.Lowered, target: Target, arguments: float) -> tuple[float, str | None]:
    """The bytes that a program needs beside its arguments, and its text; None where it does not fit."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        message = str(e).partition("\n")[0]
        size = _TOO_LARGE.search(message)
        if size is None or "hbm" not in message.lower():
            raise ConfigError(f"the compiler for {target.name} refuses a program: {message}") from None
        number, unit = (size[1], size[2]) if size[1] else (size[3], size[4])
        return max(0.0, float(number) * _UNIT[unit] - arguments), None
    stats = compiled.memory_analysis()
    assert stats is not None, target.name  # libtpu has it
    # What is given away for results is counted with the arguments.
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return float(needed + stats.generated_code_size_in_bytes), compiled.as_text()


def table(e: Estimate) -> str:
    """What was found, for people."""
    parts = {
        "parameters": e.parameter_bytes,
        f"cache of {e.cache_tokens} tokens": e.cache_bytes,
        "programs": max(p.temporary_bytes for p in e.programs),
    }
    sizes = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in parts.items())
    kernels = ", ".join(e.kernels)
    lines = [
        f"{e.target.name}: {e.target.num_devices} devices share the model, attention by {kernels}",
        f"  memory a device: {sizes}; {e.used_bytes / _GIB:.2f} of {e.target.device.memory_bytes / _GIB:.2f} GiB",
    ]
    if not e.fits:
        return "\n".join(
            [*lines, "  IT DOES NOT FIT: take more devices, fewer --max-requests or less --context."]
        )
    for p in e.programs:
        assert p.profile is not None
        what = "answers" if p.tokens == 1 else "prompts"
        lines.append(
            f"  a step of {p.rows * p.tokens} tokens of {what}: {p.step_s * _MS:.2f} ms, that is "
            f"{p.rows * p.tokens / p.step_s:,.0f} tokens/s; the compiler's estimate {p.profile.compiled_s * _MS:.2f} ms, "
            f"parameters and keys read {p.memory_s * _MS:.2f} ms, links {p.profile.link_s * _MS:.2f} ms"
        )
        lines += [
            f"    {c.kind:<18} over {c.axes:<8} {c.times:>4} times  {c.sent_bytes / 1e6:>9.3f} MB sent by each device"
            for c in p.profile.collectives
        ]
    return "\n".join(lines)
