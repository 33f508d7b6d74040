import pytest

from pippin.core.hardware.collectives import Collective
from pippin.core.hardware.crossings import read_crossings
from pippin.core.hardware.device import Device
from pippin.core.hardware.hlo import Program
from pippin.core.hardware.profile import read_profile

_TEXT = """
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %r = f32[8,128]{1,0} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %send = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%r, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}
  %recv = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %y = f32[8,128]{1,0} copy(%x)
}
"""
_BYTES = 8 * 128 * 4


def text(kind: str, target: str) -> str:
    return _TEXT.replace("KIND", kind).replace("TARGET", target)


@pytest.mark.parametrize(
    ("kind", "name", "sent"),
    [
        ("ALL_REDUCE", "all-reduce", 2 * 3 / 4),
        ("ALL_GATHER", "all-gather", 3.0),
        ("REDUCE_SCATTER", "reduce-scatter", 3 / 4),
        ("ALL_TO_ALL", "all-to-all", 3 / 4),
    ],
)
def test_each_kind_sends_what_a_ring_of_slices_needs(kind: str, name: str, sent: float) -> None:
    program = Program(text(kind, '"{1,2,3,4}x{0:3}"'))
    assert read_crossings(program, {"data": 4, "fsdp": 1}) == (
        Collective(name, 4, "data", per_node=1, sent_bytes=sent * _BYTES, times=1),
    )


@pytest.mark.parametrize(
    ("target", "axes"),
    [
        ("{{100000,200000},{100001,200001},{300000,400000},{300001,400001}}", "data"),
        ("{{100000,300000},{100001,300001},{200000,400000},{200001,400001}}", "pipeline"),
        ("{{100000,200000,300000,400000},{100001,200001,300001,400001}}", "pipeline+data"),
        ("{{100000,400000},{200000,300000}}", "other"),
    ],
)
def test_groups_of_slices_are_named_by_the_axes_that_cross_them(target: str, axes: str) -> None:
    (found,) = read_crossings(Program(text("ALL_REDUCE", target)), {"pipeline": 2, "data": 2})
    assert found.axes == axes


def test_a_permutation_sends_all_of_its_operand_along_the_axis_that_its_pairs_make_up() -> None:
    pairs = "{{100000->300000},{300000->100000},{200000->400000},{400000->200000}}"
    (found,) = read_crossings(Program(text("ONE_TO_ONE", pairs)), {"pipeline": 2, "data": 2})
    assert (found.kind, found.axes, found.sent_bytes) == ("collective-permute", "pipeline", _BYTES)


def test_what_crosses_slices_goes_over_a_device_s_share_of_the_network_and_the_rest_over_links() -> None:
    device = Device("tpu-test", 0.0, 1.0, 16.0, network_bandwidth=2.0, clock_hz=1.0)
    profile = read_profile(
        text("ALL_REDUCE", '"{1,2}x{0:3}"'), {"data": 2, "fsdp": 4}, device, across={"data": 2, "fsdp": 1}
    )
    inside, outside = profile.collectives
    assert (inside.axes, inside.over_network) == ("fsdp", False)
    assert (outside.axes, outside.over_network) == ("data", True)
    assert profile.network_s == pytest.approx(_BYTES / 2.0)
    assert profile.link_s == pytest.approx(profile.network_s + 2 * _BYTES * 3 / 4 / 16.0)
    assert profile.moved_bytes == 2 * _BYTES  # of the copy alone


def test_a_target_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="no target that can be read"):
        read_crossings(Program(text("ALL_REDUCE", "?")), {"data": 2})
