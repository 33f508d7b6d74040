"""Both steps on libtpu, an overlay of this test, at a size of seconds."""

import importlib.util

import pytest

from benchmarks.compiled import compare
from benchmarks.long_sequence import measure
from benchmarks.plain_decoder import Decoder


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, as its Bazel target has it"
)
def test_both_steps_are_compiled_and_do_about_the_same() -> None:
    shape = Decoder(
        num_layers=2,
        dim=512,
        num_heads=4,
        hidden_dim=1024,
        vocab_size=1024,
        batch_size=4,
        sequence_length=512,
    )
    ours, plain = compare(shape, "tpu-v5e-4")
    assert 0.5 < ours.step_s / plain.step_s < 1.5
    assert 0 < ours.temporary_bytes < 2 * plain.temporary_bytes
    assert ours.sent_bytes > 0 and plain.sent_bytes > 0 and plain.moved_bytes > 0


def test_blocks_and_chunks_need_less_memory() -> None:
    assert (
        measure("blockwise", "chunked", 2048)["temporary_bytes"]
        < measure("naive", "naive", 2048)["temporary_bytes"]
    )
