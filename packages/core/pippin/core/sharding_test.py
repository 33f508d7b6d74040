"""Logical axes on a mesh of eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pippin.core.config_tree import override
from pippin.core.errors import ShardingError
from pippin.core.sharding import (
    MESH_AXES,
    AxisRuleConfig,
    MeshConfig,
    constrain,
    mesh_in_use,
    num_shards,
    on_shards,
    shard_spec,
    use_mesh,
)

# What BUILD sets for this test. Not set here: a run of several files would have them all on eight devices.
FLAGS = "--xla_force_host_platform_device_count=8"


@pytest.fixture
def eight_devices() -> None:
    if jax.device_count() != 8:
        pytest.skip(f"needs XLA_FLAGS={FLAGS}")


# The grid


def test_the_free_axis_takes_the_devices_that_are_left():
    assert MeshConfig().shape(8)["data"] == 8
    shape = MeshConfig(data=2, fsdp=-1, tensor=2).shape(8)
    assert (shape["data"], shape["fsdp"], shape["tensor"]) == (2, 2, 2)
    assert tuple(shape) == MESH_AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor": 3},
            r"does not fit 8 devices: its sizes multiply to 3, which must divide the number of devices",
        ),
        (
            {"data": 4},
            r"its sizes multiply to 4, which must equal the number of devices\. Change a size, or write -1",
        ),
        ({"data": 1, "tensor": 16}, r"its sizes multiply to 16, which must equal"),
        ({"tensor": 16}, r"its sizes multiply to 16, which must divide"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes: dict[str, int], message: str):
    with pytest.raises(ShardingError, match=message):
        MeshConfig(**sizes).shape(8)


@pytest.mark.parametrize("sizes", [{"fsdp": -1}, {"tensor": 0}, {"tensor": -2}])
def test_sizes_that_mean_nothing_are_refused(sizes: dict[str, int]):
    with pytest.raises(ShardingError, match="every size must be positive, and at most one -1"):
        MeshConfig(**sizes)


@pytest.mark.usefixtures("eight_devices")
def test_make_uses_the_devices_that_it_is_given():
    mesh = MeshConfig(tensor=2).make(jax.devices()[:4])
    assert (mesh.shape["data"], mesh.shape["tensor"], mesh.size) == (2, 2, 4)


# The rules


def test_rules_say_which_mesh_axes_split_a_dim():
    cfg = MeshConfig()
    assert cfg.spec(("embed", "mlp")) == PartitionSpec(("fsdp", "expert"), ("tensor",))
    assert cfg.spec(("batch", "sequence", None)) == PartitionSpec(
        ("data", "fsdp", "expert"), ("sequence",), None
    )
    assert cfg.spec(("tracks", None)) == PartitionSpec(None, None)


def test_a_mesh_axis_splits_one_dim_of_an_array():
    assert MeshConfig().spec(("batch", "embed")) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert MeshConfig().spec(("experts", "embed")) == PartitionSpec(("expert",), ("fsdp",))


def test_a_rule_can_be_changed_in_a_recipe():
    cfg = override(MeshConfig(), {"rules.0.mesh": "data,expert"})
    assert cfg.spec(("batch",)) == PartitionSpec(("data", "expert"))


def test_unknown_axes_name_the_nearest():
    with pytest.raises(
        ShardingError,
        match=r"unknown logical axis 'vocabulary' \(did you mean 'vocab'\?\)\. Use one of batch,",
    ):
        MeshConfig().spec(("vocabulary",))
    with pytest.raises(ShardingError, match=r"unknown logical axis 'embd'"):
        AxisRuleConfig(logical="embd")
    with pytest.raises(
        ShardingError, match=r"unknown mesh axis 'tensr' \(did you mean 'tensor'\?\)\. Use one of pipeline,"
    ):
        AxisRuleConfig(logical="mlp", mesh=("tensr",))
    with pytest.raises(ShardingError, match=r"unknown logical axis 'sequnce'"):
        constrain(jnp.zeros((2, 2)), "batch", "sequnce")


def test_two_rules_for_one_axis_are_refused():
    rule = AxisRuleConfig(logical="mlp", mesh=("tensor",))
    with pytest.raises(
        ShardingError, match=r"several rules for mlp: a logical axis has one\. Put all mesh axes into it"
    ):
        MeshConfig(rules=(rule, rule))


# Activations


def test_constrain_changes_nothing_without_a_mesh():
    x = jnp.zeros((8, 4))
    assert constrain(x, "batch", None) is x


@pytest.mark.usefixtures("eight_devices")
def test_constrain_splits_over_the_mesh_in_use():
    cfg = MeshConfig(tensor=2)
    mesh = cfg.make()

    @jax.jit
    def run(x):
        return constrain(x * 2.0, "batch", "sequence", "heads")

    with use_mesh(cfg, mesh):
        y = run(jnp.ones((8, 3, 4)))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", None, "tensor")), y.ndim)
    assert y.addressable_shards[0].data.shape == (2, 3, 2)
    assert float(y.sum()) == 2.0 * 8 * 3 * 4


@pytest.mark.usefixtures("eight_devices")
def test_the_mesh_in_use_ends_with_its_block():
    cfg = MeshConfig()
    mesh = cfg.make()
    with pytest.raises(RuntimeError), use_mesh(cfg, mesh):
        assert mesh_in_use() == (cfg, mesh)
        raise RuntimeError
    assert mesh_in_use() is None
    x = jnp.zeros(3)
    assert constrain(x, "batch") is x


@pytest.mark.usefixtures("eight_devices")
def test_a_dim_that_the_mesh_does_not_divide_is_refused():
    cfg = MeshConfig(data=1, tensor=8)
    mesh = cfg.make()
    with (
        use_mesh(cfg, mesh),
        pytest.raises(
            ShardingError,
            match=r"a dim of 2 on the logical axis 'kv_heads' cannot be split 8 ways, over the mesh axes tensor \(the "
            r"array's shape is \(1, 2\)\)\. Make the dim a multiple of 8",
        ),
    ):
        constrain(jnp.zeros((1, 2)), "batch", "kv_heads")
    with (
        use_mesh(cfg, mesh),
        pytest.raises(ShardingError, match=r"shape \(1, 2\) got the logical axes \('batch',\)"),
    ):
        constrain(jnp.zeros((1, 2)), "batch")


@pytest.mark.usefixtures("eight_devices")
def test_a_parameter_is_placed_by_its_logical_axes():
    cfg = MeshConfig(data=1, fsdp=4, tensor=2)
    mesh = cfg.make()
    weight = jax.device_put(jnp.zeros((16, 6)), cfg.sharding(mesh, ("embed", "mlp"), (16, 6)))
    assert weight.addressable_shards[0].data.shape == (4, 3)
    with pytest.raises(ShardingError, match=r"a dim of 5 on the logical axis 'mlp' cannot be split 2 ways"):
        cfg.sharding(mesh, ("embed", "mlp"), (16, 5))


def test_the_parts_of_a_tensor_are_the_devices_of_all_its_axes(eight_devices: None):
    assert num_shards("batch", "sequence") == 1
    cfg = MeshConfig(data=2, fsdp=2, sequence=2)
    with use_mesh(cfg, cfg.make()):
        assert num_shards("batch", "sequence") == 8
        assert num_shards("batch") == 4
        assert num_shards("heads") == 1


# Parts


def test_on_shards_calls_the_function_itself_where_nothing_is_split():
    assert on_shards(jnp.sum, (None,), None) is jnp.sum


@pytest.mark.usefixtures("eight_devices")
def test_a_function_sees_the_parts_over_its_axes_and_the_compiler_splits_the_rest():
    cfg = MeshConfig(data=2, sequence=2, tensor=2)
    shapes = []

    def inner(x):
        shapes.append(x.shape)
        return x + jax.lax.axis_index("tensor").astype(x.dtype)

    def outer(x):
        shapes.append(x.shape)
        assert (num_shards("sequence"), num_shards("heads")) == (1, 2)
        x = constrain(x * 2.0, "batch", "sequence", "heads")
        spec = shard_spec(("batch", "sequence", "heads"), over=("tensor",))
        x = on_shards(inner, (spec,), spec, over=("tensor",))(x)
        return jax.lax.psum(x, "sequence")

    with use_mesh(cfg, cfg.make()):
        spec = shard_spec(("batch", "sequence", None), over=("sequence",))
        y = jax.jit(on_shards(outer, (spec,), PartitionSpec(), over=("sequence",)))(jnp.ones((4, 6, 8)))
    assert shapes[:2] == [(4, 3, 8), (4, 3, 4)]
    assert y.shape == (4, 3, 8)
    assert float(y[0, 0, 0]) == 4.0 and float(y[0, 0, -1]) == 6.0


# Hybrid meshes


def test_axes_cross_slices_in_the_order_that_the_config_names():
    cfg = MeshConfig(data=2, fsdp=8, tensor=2)
    across = cfg.shape_across(cfg.shape(32), 8)
    assert (across["data"], across["fsdp"], across["tensor"]) == (2, 4, 1)
    cfg = override(cfg, {"across": "fsdp"})
    assert cfg.shape_across(cfg.shape(32), 8)["fsdp"] == 8


def test_a_mesh_whose_axes_cannot_cross_the_slices_is_refused():
    cfg = MeshConfig(data=1, fsdp=2, tensor=-1)
    message = (
        r"of 4 slices, and the axes that may cross slices \(data=1, pipeline=1, fsdp=2\) take up 2 of them"
    )
    with pytest.raises(ShardingError, match=message):
        cfg.shape_across(cfg.shape(8), 4)
    with pytest.raises(ShardingError, match=r"unknown mesh axis 'tensr'"):
        MeshConfig(across=("tensr",))


class _Device:
    """A TPU's, as a topology describes it."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v5e of a test", 0, 0

    def __init__(self, index: int):
        self.id, self.slice_index = index, index // 4
        self.coords = (index % 2, index // 2 % 2, 0)

    def __repr__(self) -> str:
        return f"{self.slice_index}.{self.id % 4}"


def test_a_hybrid_mesh_keeps_the_devices_of_a_slice_together():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make([_Device(i) for i in range(8)])  # pyright: ignore[reportArgumentType]
    grid = mesh.devices.reshape(2, 2, 2)  # data, fsdp, tensor
    assert [[d.slice_index for d in part.flat] for part in grid] == [[0] * 4, [1] * 4]
