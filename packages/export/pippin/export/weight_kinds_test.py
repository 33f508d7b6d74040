"""What weights are summed up as."""

from pippin.export.weight_kinds import by_kind, by_layer
from pippin.v1 import export_pb2 as pb


def weight(name: str, count: int, bits: int = 16) -> pb.ExportedWeight:
    scheme = "float16" if bits == 16 else "palettized"
    return pb.ExportedWeight(name=name, scheme=scheme, bits=bits, count=count, bytes=count * bits // 8)


WEIGHTS = [
    weight("embedding.weight", 800, 8),
    weight("decoder.layers.0.attention.q_proj.base.weight", 400, 4),
    weight("decoder.layers.0.attention.q_proj.down", 40),
    weight("decoder.layers.0.attention.q_proj.up", 60),
    weight("decoder.layers.1.attention.q_proj.weight", 400, 2),
    weight("decoder.layers.1.norm.scale", 8),
]


def test_a_linear_map_with_lora_is_of_its_kind_and_the_low_rank_is_told_apart():
    costs = by_kind(WEIGHTS)
    assert {kind: cost.count for kind, cost in costs.items()} == {
        "embedding": 800,
        "q_proj": 800,
        "LoRA": 100,
        "norms and biases": 8,
    }
    assert costs["q_proj"].bits_per_weight == 3 and costs["q_proj"].schemes == {
        "palettized 4",
        "palettized 2",
    }
    assert list(costs)[-1] == "norms and biases"


def test_what_is_in_no_layer_comes_last():
    layers = by_layer(WEIGHTS)
    assert list(layers) == ["0", "1", "ends"] and set(layers["0"]) == {"q_proj", "LoRA"}
