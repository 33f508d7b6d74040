"""`bazel run //benchmarks:compiled`: our training step, as the compiler sees it, beside a plain one written by hand in JAX.

Both are compiled for TPUs that are not here: a Llama of the same shape, sharding, remat, attention kernel and
optimizer. Then, on this CPU, the peak memory of a step over 8,192 tokens with our attention and loss, and with naive ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.plain_decoder import Decoder, compile_step

if TYPE_CHECKING:
    from pippin.core.hardware.profile import Profile
    from pippin.train.trainer_config import TrainerConfig

SHAPE = Decoder(
    num_layers=16,
    dim=2048,
    num_heads=16,
    hidden_dim=5632,
    vocab_size=32_000,
    batch_size=32,
    sequence_length=4096,
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a step. Bytes and seconds are of one device."""

    step_s: float  # no transfer hidden
    moved_bytes: float
    temporary_bytes: float
    sent_bytes: float
    compile_s: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="tpu-v5e-16", help="TPUs to compile for")
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory on this CPU")
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(_table(*compare(dataclasses.replace(SHAPE, num_layers=args.layers), args.target)))
    if not args.no_memory:
        print(_memory_table())


def compare(shape: Decoder, target_name: str) -> tuple[Compiled, Compiled]:
    """Our step and the plain one."""
    from pippin.core.hardware.accelerator import parse_target
    from pippin.core.hardware.profile import read_profile
    from pippin.core.hardware.topology import topology
    from pippin.train.hardware.estimate import estimate

    target = parse_target(target_name)
    ours = estimate(_config(shape), target)
    if ours.profile is None:
        raise SystemExit(f"error: our step does not fit {target_name}. {ours.remedy()}")
    goal = topology(target)
    began = time.monotonic()
    compiled = compile_step(shape, goal.devices, goal.options)
    plain = read_profile(compiled.as_text(), {"fsdp": target.num_devices}, target.device)
    compile_s = time.monotonic() - began
    temporary = float(compiled.memory_analysis().temp_size_in_bytes)
    return (
        _compiled(ours.profile, ours.kernels_s, ours.temporary_bytes, ours.compile_s),
        _compiled(plain, ours.kernels_s, temporary, compile_s),  # the same kernels on the same shapes
    )


def _compiled(profile: Profile, kernels_s: float, temporary_bytes: float, compile_s: float) -> Compiled:
    return Compiled(
        step_s=profile.compiled_s + kernels_s + profile.link_s,
        moved_bytes=profile.moved_bytes,
        temporary_bytes=temporary_bytes,
        sent_bytes=sum(c.sent_bytes for c in profile.collectives),
        compile_s=compile_s,
    )


def _config(shape: Decoder) -> TrainerConfig:
    from pippin.core.config_tree import override
    from pippin.layers.models.llama import llama
    from pippin.layers.position_config import RoPEConfig
    from pippin.train.recipe import all_recipes

    model = llama(
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=shape.dim // shape.num_heads,
        hidden_dim=shape.hidden_dim,
        tied=False,
        position=RoPEConfig(theta=10_000.0),
    )
    return override(
        all_recipes()["llama2_7b"].make().set(model=model, mesh_rules=()),
        {
            "model.activation_dtype": "bfloat16",
            "model.decoder.remat": "full",
            "mesh.data": 1,
            "mesh.fsdp": -1,
            "input.batch_size": shape.batch_size,
            "input.sequence_length": shape.sequence_length,
        },
    )


def _table(ours: Compiled, plain: Compiled) -> str:
    units = {
        "step_s": ("estimated step, s", 1.0, ".4f"),
        "moved_bytes": ("memory read and written, GB", 1e9, ".1f"),
        "temporary_bytes": ("temporaries, GiB", 2.0**30, ".2f"),
        "sent_bytes": ("sent by each device, GB", 1e9, ".2f"),
        "compile_s": ("compile, s", 1.0, ".0f"),
    }
    lines = [f"{'':<30}{'pippin':>10}{'plain JAX':>12}{'ratio':>8}"]
    for field, (name, unit, form) in units.items():
        a, b = getattr(ours, field) / unit, getattr(plain, field) / unit
        lines.append(f"{name:<30}{a:>10{form}}{b:>12{form}}{a / b:>8.3f}")
    return "\n".join(lines) + "\n"


def _memory_table() -> str:
    lines = [f"{'attention':<13}{'loss':<10}{'planned, GiB':>14}{'peak RSS, GiB':>16}"]
    for attention in ("blockwise", "naive"):
        for loss in ("chunked", "naive"):
            command = [sys.executable, "-P", "-m", "benchmarks.long_sequence", attention, loss]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(
                    f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
                )
            found = json.loads(done.stdout)
            planned, peak = (found[name] / 2**30 for name in ("temporary_bytes", "peak_bytes"))
            lines.append(f"{attention:<13}{loss:<10}{planned:>14.2f}{peak:>16.2f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
