"""The command on the compilers for NVIDIA GPUs: XLA's and cuDNN's are an overlay of this test, and no GPU is needed."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from pippin.core.hardware.accelerator import parse_target
from pippin.core.hardware.topology import topology
from pippin.train.compile import main
from pippin.train.hardware.flops import Flops, matmul_flops

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="needs JAX's CUDA plugin, as its Bazel target has it",
    ),
    # What cuDNN refuses, such as float32, is computed by a kernel of Pallas, by its Triton route.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

_SMALL = [
    *("--recipe", "stdlib_tiny", "--set", "model.vocab_size=512", "--set", "model.dim=128"),
    *("--set", "model.decoder.num_layers=3", "--set", "input.sequence_length=128"),
]


def compiled(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main([*_SMALL, *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("target", ["gpu-h100-8", "gpu-h200-8", "gpu-b200-8"])
def test_a_step_is_compiled_for_each_kind_of_gpu(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = compiled(capsys, "--target", target)
    assert code == 0
    assert re.search(rf"^{target} +8 +data 8 +yes", text, re.MULTILINE)
    assert "128 tokens, bfloat16: CuDNNKernel" in text
    assert "not compiled" not in text
    assert re.search(r"all-reduce +over data +groups of 8 .* GB sent by each device$", text, re.MULTILINE)


@pytest.mark.parametrize("target", ["gpu-h100-1", "gpu-b200-1"])
def test_cudnn_compiles_attention_of_grouped_heads_and_its_gradient(target: str) -> None:
    goal = topology(parse_target(target))
    one = jax.sharding.SingleDeviceSharding(goal.devices[0])
    q, kv = (jax.ShapeDtypeStruct((2, 512, n, 128), jnp.bfloat16, sharding=one) for n in (8, 2))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, kv, kv)
    # Two matmuls forward and five back, over all pairs of 512 tokens.
    assert matmul_flops(traced.jaxpr.jaxpr) == Flops(kernels=(2 + 5) * 2.0 * 2 * 8 * 512 * 512 * 128)
    text = traced.lower().compile(compiler_options=dict(goal.options)).as_text()
    calls = re.findall(r"u8\[(\d+)\][^)]*\) custom-call\(.*__cudnn\$fmha\w*", text)
    assert len(calls) == 2
    # The backward pass works in memory of a size that only cuDNN's own compiler knows.
    assert max(int(size) for size in calls) > 0


def test_what_crosses_nodes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    split = ["--set", "mesh_rules=()", "--set", "mesh.fsdp=8", "--set", "input.batch_size=16"]
    code, text = compiled(capsys, *split, "--target", "gpu-h100-16")
    assert code == 0
    assert re.search(r"over data +groups of 2 .* sent by each device, over the network$", text, re.MULTILINE)
    assert re.search(r"over fsdp +groups of 8 .* sent by each device$", text, re.MULTILINE)
    assert re.search(r"sent by each device: [\d.]+ GB inside a node, .*; [\d.]+ GB over the network", text)


def test_the_axes_that_may_cross_nodes_are_those_of_the_mesh_s_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    over = ["--set", "mesh_rules=()", "--set", "input.batch_size=16", "--target", "gpu-h100-16"]
    # Data crosses them, and stages are inside a node, although pipeline is the mesh's outermost axis.
    pipeline = ["--set", "mesh.pipeline=2", "--set", "model.decoder.pipeline=Pipeline"]
    pipeline += ["--set", "model.decoder.pipeline.microbatches=2", "--set", "model.decoder.num_layers=2"]
    code, text = compiled(capsys, *over, *pipeline)
    assert code == 0
    assert re.search(r"over data +groups of 8 .* over the network$", text, re.MULTILINE)
    assert re.search(r"collective-permute +over pipeline .* sent by each device$", text, re.MULTILINE)
    code, text = compiled(capsys, *over, "--set", "mesh.data=1", "--set", "mesh.sequence=16")
    assert code == 2
    assert "the devices are of 2 slices, and the axes that may cross slices" in text


def test_a_head_that_cudnn_refuses_is_compiled_by_triton(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = compiled(
        capsys, "--set", "model.decoder.layer.attention.head_dim=256", "--target", "gpu-h100-1"
    )
    assert code == 0
    assert "TritonKernel" in text and "not CuDNNKernel: head_dim (256)" in text


def test_a_step_that_does_not_fit_is_said_with_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = compiled(capsys, "--set", "input.batch_size=65536", "--target", "gpu-h100-1")
    assert code == 1
    assert re.search(r"^gpu-h100-1 +1 +one device +NO +[\d.]+ of 79.1", text, re.MULTILINE)
    assert "A microbatch has 65536 rows a device: SetAccumulation" in text


def test_gpus_that_do_not_fill_their_nodes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = compiled(capsys, "--target", "gpu-h100-12")
    assert code == 2
    assert "gpu-h100-12 does not fill its nodes" in text and "Traceback" not in text
