import pytest

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import parse_target, target_of
from pippin.core.hardware.device import DEVICES


@pytest.mark.parametrize(
    ("name", "devices", "platform"),
    [
        ("tpu-v5p-512", 256, "tpu"),
        ("tpu-v5e-256", 256, "tpu"),
        ("tpu-7x-16", 16, "tpu"),
        ("tpu-v5p-512x4", 1024, "tpu"),
        ("gpu-h100-8", 8, "gpu"),
        ("cpu-2", 2, "cpu"),
    ],
)
def test_a_name_says_how_many_devices(name: str, devices: int, platform: str) -> None:
    target = parse_target(name)
    assert (target.num_devices, target.platform, target.name) == (devices, platform, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu-v5x-8", r"unknown target 'tpu-v5x-8' \(did you mean 'tpu-v5\w'\?\). Write KIND-COUNT"),
        ("tpu-v5p-3", r"a multiple of 2 \(it counts TensorCores\)"),
        ("gpu-h100-0", "a number of at least 1"),
        ("tpu-v5e", "a number of at least 1. Write tpu-v5e-4"),
        ("tpu-v5e-4x0", "at least 1, and slices are of TPUs. Write tpu-v5e-4x2"),
        ("gpu-h100-8x4", "slices are of TPUs. Write how many devices there are in all: gpu-h100-32"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_target(name)


def test_each_slice_is_a_torus() -> None:
    assert parse_target("tpu-v5p-512").torus() == (4, 8, 8)
    assert parse_target("tpu-v5e-256x2").torus() == (16, 16)
    assert parse_target("tpu-7x-16").torus() == (2, 2, 2)  # two devices a chip
    assert parse_target("tpu-v5e-4x1") == parse_target("tpu-v5e-4")
    with pytest.raises(
        ConfigError, match="tpu-v5e-512 is no TPU .* several slices of one, such as tpu-v5e-256x2"
    ):
        parse_target("tpu-v5e-512").torus()
    with pytest.raises(
        ConfigError, match="tpu-7x-9 is no TPU that there is: slices of tpu-7x are tpu-7x-8, tpu-7x-16"
    ):
        parse_target("tpu-7x-9").torus()
    with pytest.raises(
        ConfigError, match="tpu-v5e-48 is no TPU that there is: slices of tpu-v5e are tpu-v5e-1, tpu-v5e-4"
    ):
        parse_target("tpu-v5e-48").torus()


def test_gpus_fill_their_nodes() -> None:
    assert [parse_target(f"gpu-h100-{n}").nodes() for n in (1, 4, 8, 256)] == [
        (1, 1),
        (1, 4),
        (1, 8),
        (32, 8),
    ]
    with pytest.raises(
        ConfigError, match="gpu-h100-12 does not fill its nodes, which have 8 GPUs each. Use gpu-h100-8"
    ):
        parse_target("gpu-h100-12").nodes()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "tpu-v5e-8"),
        ("TPU v5", "tpu-v5p-16"),
        ("TPU v6 lite", "tpu-v6e-8"),
        ("TPU7x", "tpu-7x-8"),
        ("NVIDIA H100 80GB HBM3", "gpu-h100-8"),
        ("cpu", "cpu-8"),
    ],
)
def test_the_devices_that_jax_finds_have_a_name(kind: str, name: str) -> None:
    assert target_of(kind, 8, name.partition("-")[0]).name == name


def test_an_accelerator_without_an_entry_is_one_of_its_platform() -> None:
    target = target_of("NVIDIA A100-SXM4-40GB", 8, "gpu")
    assert (target.name, target.platform) == ("gpu-other-8", "gpu")
    assert target_of("TPU v5 lite", 512, "tpu", num_slices=2).name == "tpu-v5e-256x2"
    assert target_of("TPU v4", 4, "tpu").name == "tpu-other-4"


def test_a_tpu_s_clock_is_its_peak_over_the_multiplications_of_a_cycle() -> None:
    # Matrix units: four of 128 x 128 (v5e), two cores of four (v5p), four of 256 x 256 (v6e, and half of a 7x).
    units = {"tpu-v5e": 4 * 128**2, "tpu-v5p": 8 * 128**2, "tpu-v6e": 4 * 256**2, "tpu-7x": 4 * 256**2}
    for kind, multiplications in units.items():
        device = DEVICES[kind]
        assert device.clock_hz * 2 * multiplications == pytest.approx(device.peak_flops, rel=0.005)
