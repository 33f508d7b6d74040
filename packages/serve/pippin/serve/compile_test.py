"""The programs that serve a model, by the TPUs' own compiler: libtpu is an overlay of this test, and no TPU is needed."""

import importlib.util
import re

import pytest

from pippin.core.config_tree import override
from pippin.core.errors import ShardingError
from pippin.core.hardware.accelerator import parse_target
from pippin.layers.models.llama import llama3_2_1b
from pippin.serve.compile import main
from pippin.serve.compiled import estimate, table
from pippin.serve.engine.scheduler import Limits

_TINY = override(
    llama3_2_1b(),
    {
        "vocab_size": 512,
        "dim": 256,
        "decoder.num_layers": 2,
        "decoder.layer.attention.num_heads": 8,
        "decoder.layer.attention.num_kv_heads": 2,
        "decoder.layer.attention.head_dim": 128,
        "decoder.layer.feed_forward.hidden_dim": 512,
    },
)
_LIMITS = Limits(num_pages=64, longest=256, max_requests=4, chunk_tokens=128, row_tokens=128)

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@needs_libtpu
def test_a_step_is_compiled_with_the_paged_kernel_and_split_over_all_devices() -> None:
    one, four = (estimate(_TINY, _LIMITS, parse_target(f"tpu-v5e-{n}")) for n in (1, 4))
    assert one.kernels == four.kernels == ("PagedTPUKernel",)
    assert one.fits and four.fits
    # Two key heads on four devices are there twice.
    assert one.cache_bytes / 2 < 1.01 * four.cache_bytes
    assert one.parameter_bytes / 4 < four.parameter_bytes < one.parameter_bytes / 3
    assert not one.programs[0].profile.collectives
    answers, prompts = four.programs
    kinds = {c.kind for c in answers.profile.collectives}
    # Two sums a layer and one of the embedding, and the logits that every device gets.
    assert kinds == {"all-reduce", "all-gather"}
    assert (answers.rows * answers.tokens, prompts.rows * prompts.tokens) == (4, 128)
    assert 0 < answers.step_s < prompts.step_s
    text = table(four)
    assert re.search(r"all-reduce +over tensor +5 times", text)
    assert "4 devices share the model, attention by PagedTPUKernel" in text


@needs_libtpu
def test_int8_weights_and_cache_are_compiled_too() -> None:
    floats = estimate(_TINY, _LIMITS, parse_target("tpu-v5e-4"))
    numbers = estimate(_TINY, _LIMITS, parse_target("tpu-v5e-4"), int8_weights=True, int8_cache=True)
    # JAX's kernel reads one scale for all.
    assert numbers.kernels == ("PagedBlockwiseKernel",)
    assert numbers.parameter_bytes < 0.52 * floats.parameter_bytes
    # Of 128 numbers each, with a scale of 4 bytes, and not of 256 bytes.
    assert numbers.cache_bytes / floats.cache_bytes == pytest.approx(132 / 256, rel=0.01)


@needs_libtpu
def test_devices_that_cannot_share_the_model_are_refused() -> None:
    with pytest.raises(ShardingError, match="16 devices cannot share this model.*8 heads"):
        estimate(_TINY, _LIMITS, parse_target("tpu-v5e-16"))


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--model", "llama3_8b", "--target", "gpu-h100-8"], "for one slice of TPUs"),
        (["--model", "llama3_8b", "--target", "tpu-v5e-4x2"], "for one slice of TPUs"),
        (["--model", "llama3_9b", "--target", "tpu-v5e-4"], "neither a file, nor a directory"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert problem in capsys.readouterr().err
