"""What the compiler of an accelerator says of a training step: whether it fits, and how long it will take."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
from flax import nnx

from pippin.core.config_tree import transform
from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import Target
from pippin.core.hardware.memory import shard_bytes
from pippin.core.hardware.profile import Profile, read_profile
from pippin.core.hardware.topology import topology
from pippin.core.module import merge, split
from pippin.layers.kernel_config import ReferenceKernelConfig
from pippin.layers.kernel_select import Choice, record_choices
from pippin.train.hardware.flops import Flops, function_flops, matmul_flops
from pippin.train.hardware.mesh_rules import Applied, apply_mesh_rules
from pippin.train.trainer import abstract_batch

# What libtpu says of a program that does not fit: its "temporaries" are all that it needs, arguments included.
_TOO_LARGE = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\)")
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One training step on one target. Bytes and seconds are of one device."""

    target: Target
    applied: Applied
    mesh: dict[str, int]
    parameter_bytes: float
    learner_bytes: float
    temporary_bytes: float  # activations, gradients, and what is gathered of split parameters
    program_bytes: float  # NaN where it does not fit
    model_flops: float  # of the whole step, all devices: see `model_flops`
    executed: Flops  # the same with what is computed again, and with the attention that the kernels do
    tokens: int
    kernels: tuple[Choice, ...]  # of attention
    left_out: str  # what was not compiled, and why
    profile: Profile | None  # None: libtpu refuses a program that does not fit
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether everything has a place in the device's memory."""
        return self.profile is not None and self.used_bytes <= self.target.device.memory_bytes

    @property
    def used_bytes(self) -> float:
        """All of these: what a device needs."""
        program = 0.0 if math.isnan(self.program_bytes) else self.program_bytes
        return self.parameter_bytes + self.learner_bytes + self.temporary_bytes + program

    @property
    def compiled_s(self) -> float:
        """What XLA compiled: by the cycles that libtpu estimates, or by the roofline of a GPU."""
        return self.profile.compiled_s if self.profile else math.nan

    @property
    def kernels_s(self) -> float:
        """What kernels of Pallas and cuDNN compute, of which there is no estimate: no block skipped, at the peak."""
        return self.executed.kernels / (self.target.num_devices * self.target.device.peak_flops)

    @property
    def compute_s(self) -> float:
        """Both together."""
        return self.compiled_s + self.kernels_s

    @property
    def link_s(self) -> float:
        """What crosses links and the network, over their bandwidth."""
        return self.profile.link_s if self.profile else math.nan

    @property
    def step_s(self) -> tuple[float, float]:
        """With all transfers hidden behind computing, and with none of them."""
        return max(self.compute_s, self.link_s), self.compute_s + self.link_s

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation, with no transfer hidden and with all."""
        peak = self.target.num_devices * self.target.device.peak_flops
        least, most = self.step_s
        return self.model_flops / (peak * most), self.model_flops / (peak * least)

    def remedy(self) -> str:
        """What would help a step that does not fit; empty where it does."""
        if self.fits:
            return ""
        state = self.parameter_bytes + self.learner_bytes
        if state > self.target.device.memory_bytes / 2:
            return (
                "The state alone takes more than half: split it over more devices (SetMesh, a larger fsdp)."
            )
        cfg = self.applied.cfg
        rows = cfg.input.batch_size / (cfg.mesh.ways("batch", self.mesh) * cfg.learner.microbatches)
        if rows > 1:
            return f"A microbatch has {rows:g} rows a device: SetAccumulation with fewer rows_per_device."
        return "One row is too long: SetRemat full, or split heads and feed-forwards (SetMesh, tensor)."


def estimate(cfg: Any, target: Target) -> Estimate:
    """Compiles the training step of a trainer's config for a target, and reads what came out.

    Raises:
        ConfigError: the config and the target do not fit each other, or there is no compiler for it.
        ShardingError: the mesh does not fit the devices or the model.
    """
    applied = apply_mesh_rules(cfg, target)
    cfg = applied.cfg
    goal = topology(target)
    # The compiler of GPUs has the nodes of a target as processes; of those that are there, JAX finds out the nodes.
    is_gpu = target.platform == "gpu"
    on_mesh = cfg.mesh.make(goal.devices, process_is_slice=is_gpu)
    trainer = cfg.build(held_out=lambda most, task: (), mesh=on_mesh)
    mesh = dict(trainer.mesh.shape)
    across = cfg.mesh.shape_across(mesh, target.num_slices)
    nodes = [d.process_index for d in trainer.mesh.devices.flat] if is_gpu else ()
    began = time.monotonic()
    with record_choices() as choices:
        traced = trainer.trace()
    parameter_bytes, learner_bytes = (
        shard_bytes(trainer.template.params),
        shard_bytes(trainer.template.learner),
    )
    try:
        compiled = traced.lower().compile(compiler_options=dict(goal.options))
    except jax.errors.JaxRuntimeError as e:
        message = str(e).partition("\n")[0]
        size = _TOO_LARGE.search(message)
        if size is None or "on HBM" not in message:
            remedy = (
                "If it names vmem, a kernel's blocks are too large: give its config a smaller block_size."
                if target.platform == "tpu"
                else "If it names cuDNN, leave out its kernel: set the attention's kernel to another."
            )
            raise ConfigError(
                f"the compiler for {target.name} refuses the step: {message} {remedy}"
            ) from None
        compiled, program = None, math.nan
        temporary = max(0.0, float(size[1]) * _UNIT[size[2]] - parameter_bytes - learner_bytes)
    else:
        stats = compiled.memory_analysis()
        temporary, program = float(stats.temp_size_in_bytes), float(stats.generated_code_size_in_bytes)
    return Estimate(
        target=target,
        applied=applied,
        mesh=mesh,
        parameter_bytes=parameter_bytes,
        learner_bytes=learner_bytes,
        temporary_bytes=temporary,
        program_bytes=program,
        model_flops=model_flops(cfg),
        executed=matmul_flops(traced.jaxpr.jaxpr),
        tokens=cfg.input.batch_size * cfg.input.sequence_length,
        kernels=tuple(choices),
        left_out=goal.left_out,
        profile=read_profile(compiled.as_text(), mesh, target.device, across, nodes) if compiled else None,
        compile_s=time.monotonic() - began,
    )


def model_flops(cfg: Any) -> float:
    """What a step has to compute: three times the matmuls of the forward pass, with all of attention's logits.

    Nothing is counted for what is computed again. That attention's masked half counts too is how the
    utilisations published in arXiv:2507.05411, table 3, can be reproduced.
    """
    whole = transform(cfg.model, lambda c: ReferenceKernelConfig() if c.PROVIDES == "attention_kernel" else c)
    definition, params = split(nnx.eval_shape(lambda: whole.build(rngs=nnx.Rngs(0))))
    forward = function_flops(
        lambda p, b: merge(definition, p).loss(b)[0], params, abstract_batch(1, cfg.input.sequence_length)
    )
    return 3 * forward.total * cfg.input.batch_size
