import pytest

from pippin.train.hardware.hlo import read_profile

_MESH = {"data": 2, "fsdp": 4, "tensor": 1}

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


def _profile(groups: str = "{{0,4},{1,5},{2,6},{3,7}}"):
    return read_profile(_TEXT.replace("GROUPS", groups), _MESH)


def test_a_loop_s_cycles_count_as_often_as_it_turns_and_absent_estimates_not_at_all() -> None:
    profile = _profile()
    assert profile.cycles == 26 * 100 + 5
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
    profile = read_profile(text, _MESH)
    assert (profile.cycles, profile.unknown_loops) == (105, 1)


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
    gather, scatter = sorted(read_profile(_FUSED, _MESH).collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", "fsdp", 1)
    assert gather.sent_bytes == 192 * 192 * 2 * 3 / 4
    assert (scatter.kind, scatter.axes, scatter.times) == ("reduce-scatter", "fsdp", 1)
    assert scatter.sent_bytes == 512 * 192 * 2 * 3 / 4
