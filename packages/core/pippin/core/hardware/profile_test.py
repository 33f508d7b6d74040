from collections.abc import Sequence

import pytest

from pippin.core.hardware.device import Device, Gpu
from pippin.core.hardware.profile import Profile, read_profile

_MESH = {"data": 2, "fsdp": 4, "tensor": 1}
_TPU = Device("tpu-test", 0.0, 1.0, link_bandwidth=1.0, clock_hz=1.0)

_TEXT = """
HloModule step

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(26)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(8,128)}) parameter(0)
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %g = bf16[8,1024]{1,0} all-gather(%f), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %f)
}

%fused (q: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0} multiply(%q, %q), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%x), condition=%cond, body=%body
  %s = f32[1]{0} custom-call(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %r = f32[256]{0} all-reduce(%x), replica_groups=GROUPS, to_apply=%add
  ROOT %y = f32[8]{0} fusion(%w), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"5"}
}
"""


def _profile(
    groups: str = "{{0,4},{1,5},{2,6},{3,7}}", device: Device = _TPU, nodes: Sequence[int] = ()
) -> Profile:
    return read_profile(_TEXT.replace("GROUPS", groups), _MESH, device, nodes=nodes)


def test_a_loop_s_cycles_count_as_often_as_it_turns_and_absent_estimates_not_at_all() -> None:
    profile = _profile()
    assert profile.compiled_s == 26 * 100 + 5
    assert (profile.loops, profile.unknown_loops) == (1, 0)


def test_a_gather_s_bytes_count_as_often_as_its_loop_turns() -> None:
    (gather,) = [c for c in _profile().collectives if c.kind == "all-gather"]
    assert (gather.group_size, gather.axes, gather.times) == (4, "fsdp", 26)
    assert gather.sent_bytes == 26 * 8 * 1024 * 2 * 3 / 4


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("{{0,1,2,3,4,5,6,7}}", "data+fsdp", 8),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", "fsdp", 4),
        ("mesh['a'=8] {'a'}", "data+fsdp", 8),
        ("{{0,3},{1,2},{4,7},{5,6}}", "other", 2),
    ],
)
def test_groups_are_named_by_the_axes_that_they_lie_along(groups: str, axes: str, size: int) -> None:
    (reduce,) = [c for c in _profile(groups).collectives if c.kind == "all-reduce"]
    assert (reduce.axes, reduce.group_size) == (axes, size)
    assert reduce.sent_bytes == 2 * 256 * 4 * (size - 1) / size


def test_a_loop_of_unknown_length_is_counted_as_such() -> None:
    text = _TEXT.replace("constant(26)", "parameter(1)").replace("GROUPS", "{{0,1}}")
    profile = read_profile(text, _MESH, _TPU)
    assert (profile.compiled_s, profile.unknown_loops) == (105, 1)


_FUSED = """
%all-reduce-scatter.3 (p: bf16[512,192]) -> bf16[64,192] {
  %r = bf16[512,192]{1,0} all-reduce(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = bf16[64,192]{1,0} dynamic-slice(%r, %i)
}

%start (p: bf16[48,192]) -> bf16[192,192] {
  ROOT %g = bf16[192,192]{1,0} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

%done (p: bf16[48,192]) -> bf16[192,192] {
  ROOT %g = bf16[192,192]{1,0} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %a = bf16[192,192]{1,0} fusion(%x), kind=kCustom, calls=%start
  %b = bf16[192,192]{1,0} fusion(%a), kind=kCustom, calls=%done
  ROOT %c = bf16[64,192]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_transfers_that_are_fused_count_once_and_a_fused_scatter_is_one() -> None:
    gather, scatter = sorted(read_profile(_FUSED, _MESH, _TPU).collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", "fsdp", 1)
    assert gather.sent_bytes == 192 * 192 * 2 * 3 / 4
    assert (scatter.kind, scatter.axes, scatter.times) == ("reduce-scatter", "fsdp", 1)
    assert scatter.sent_bytes == 512 * 192 * 2 * 3 / 4


def test_what_crosses_nodes_goes_over_the_adapters_of_all_its_members_there() -> None:
    device = Device("gpu-test", 0.0, 1.0, 16.0, network_bandwidth=2.0, clock_hz=1.0)
    for groups, per_node, bandwidth in (
        ("{{0,1,2,3},{4,5,6,7}}", 0, 16.0),
        ("{{0,4},{1,5},{2,6},{3,7}}", 1, 2.0),
        ("{{0,1,2,3,4,5,6,7}}", 4, 8.0),
    ):
        profile = _profile(groups, device, nodes=[0, 0, 0, 0, 1, 1, 1, 1])
        (reduce,) = [c for c in profile.collectives if c.kind == "all-reduce"]
        (gather,) = [c for c in profile.collectives if c.kind == "all-gather"]  # inside a node
        assert reduce.per_node == per_node
        assert profile.link_s == pytest.approx(reduce.sent_bytes / bandwidth + gather.sent_bytes / 16.0)


_GPU_TEXT = """
%cond (p: (s32[])) -> pred[] {
  %n = s32[] constant(3)
}

%body (p: (s32[])) -> (s32[]) {
  %stack = f32[3,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[64,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take
  %x = bf16[32,64]{1,0} parameter(2)
  %y = bf16[32,128]{1,0} fusion(%x, %w), kind=kCustom, calls=%multiply
  %put = ((f32[3,32,128]{2,1,0}, s32[], bf16[32,128]{1,0}), f32[3,32,128]{2,1,0}, u32[]) fusion-start(%all, %i, %y), kind=kLoop, calls=%place
  %all = f32[3,32,128]{2,1,0} parameter(3)
  %s = ((bf16[16,128]{1,0}, bf16[8]{0}), (bf16[64,128]{1,0}, bf16[32]{0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %d = (bf16[64,128]{1,0}, bf16[32]{0}) all-gather-done(%s)
}

%take (stack: f32[3,64,128], i: s32[]) -> bf16[64,128] {
  %p0 = f32[3,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %part = f32[1,64,128]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,64,128}
  ROOT %c = bf16[64,128]{1,0} convert(%part)
}

%multiply (x: bf16[32,64], w: bf16[64,128]) -> bf16[32,128] {
  %q0 = bf16[32,64]{1,0} parameter(0)
  %q1 = bf16[64,128]{1,0} parameter(1)
  ROOT %dot = bf16[32,128]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%place (all: f32[3,32,128], i: s32[], y: bf16[32,128]) -> f32[3,32,128] {
  %r0 = f32[3,32,128]{2,1,0} parameter(0)
  %r1 = s32[] parameter(1)
  %r2 = bf16[32,128]{1,0} parameter(2)
  %f = f32[1,32,128]{2,1,0} convert(%r2)
  ROOT %u = f32[3,32,128]{2,1,0} dynamic-update-slice(%r0, %f, %r1)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %t = (s32[]) parameter(0)
  %w = (s32[]) while(%t), condition=%cond, body=%body
  %l = f32[16,8]{1,0} parameter(1)
  %r = f32[8,4]{1,0} parameter(2)
  ROOT %g = (f32[16,4]{1,0}, s8[64]{0}) custom-call(%l, %r), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""


def _gpu(peak_flops: float, memory_bandwidth: float) -> Profile:
    gpu = Gpu("test", 9, 1, 1.0, 1)
    device = Device("gpu-test", 0.0, peak_flops, 1.0, memory_bandwidth=memory_bandwidth, gpu=gpu)
    return read_profile(_GPU_TEXT, _MESH, device)


def test_a_gpu_s_matmuls_are_bound_by_its_peak_and_float32_by_half_of_it() -> None:
    matmuls = 3 * 2 * 32 * 128 * 64 + 2 * 2 * 16 * 4 * 8
    assert _gpu(peak_flops=1.0, memory_bandwidth=1e30).compiled_s == pytest.approx(matmuls)


def test_a_gpu_s_memory_is_read_and_written_in_the_parts_that_are_needed() -> None:
    index = 4
    take = 64 * 128 * (4 + 2) + index
    multiply = 2 * (32 * 64 + 64 * 128 + 32 * 128)
    place = 32 * 128 * (2 + 4) + index
    gemm = 4 * (16 * 8 + 8 * 4 + 16 * 4) + 64
    assert _gpu(1e30, 1.0).compiled_s == pytest.approx(3 * (take + multiply + place) + gemm)


def test_of_a_transfer_that_was_started_the_results_are_what_is_sent() -> None:
    (gather,) = _gpu(1.0, 1.0).collectives
    assert (gather.kind, gather.times, gather.axes) == ("all-gather", 3, "fsdp")
    assert gather.sent_bytes == 3 * 2 * (64 * 128 + 32) * 3 / 4
