"""Tests of estimates: against the arithmetic done by hand, and against what Apple says of its own model."""

import functools
import json
import re

import numpy as np
import pytest

from pippin.core.config_tree import override, replace
from pippin.core.module import flatten_params
from pippin.core.quantized_array import Palettized, Scaled
from pippin.export.compress.testing import random_params, save_model, tiny_config
from pippin.export.latency import command
from pippin.export.latency.chips import CHIPS
from pippin.export.latency.operations import operations
from pippin.layers.feed_forward_config import FeedForwardConfig
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.layers.moe_config import MoEConfig
from pippin.layers.stack_config import SequenceConfig
from pippin.layers.unrolled import unrolled

_A17 = next(chip for chip in CHIPS if chip.name == "A17 Pro")


def test_operations_of_a_step_by_hand():
    cfg, params = unrolled(tiny_config(), random_params(tiny_config()))
    weights = flatten_params(params)
    name = "decoder.layers.0.feed_forward.up_proj.weight"
    weights[name] = Palettized(np.zeros((32, 64), np.uint8), np.zeros((1, 4, 4), np.float16), 2)
    weights["embedding.weight"] = Scaled(np.zeros((320, 32), np.int8), np.ones((320, 1), np.float16), 8)
    found = {o.name: o for o in operations(cfg, weights, 4, 128)}
    up = found[name]
    assert (up.layer, up.kind) == ("0", "up_proj")
    assert (up.nbytes, up.flops, up.bits) == (512 + 32, 2 * 4 * 32 * 64, 8 * 544 / 2048)
    down = found["decoder.layers.1.feed_forward.down_proj.weight"]
    assert (down.nbytes, down.bits) == (2 * 64 * 32, 16)
    assert found["embedding.weight (look-up)"].nbytes == 4 * (32 + 2)
    head = found["embedding.weight (logits)"]
    assert (head.layer, head.nbytes, head.flops) == ("ends", 320 * 34, 2 * 4 * 320 * 32)
    cache = found["decoder.layers.1.attention (cache)"]
    assert cache.nbytes == 2 * 2 * (2 * 16 * 128)  # keys and values, read and written, in float16
    assert cache.flops == 4 * 2 * 16 * 128 * 4
    assert len(found) == len(weights) + 2 + 1
    assert up.seconds(_A17) == pytest.approx(max(544 / 51.2e9 / 0.75, up.flops / 17.5e12 / 0.52))


def test_of_experts_only_those_that_are_chosen_count():
    tiny = replace(tiny_config(), FeedForwardConfig, MoEConfig(num_experts=4, top_k=1))
    cfg, params = unrolled(tiny, random_params(tiny))
    name = "decoder.layers.0.feed_forward.gate_proj.weight"
    one, many = (
        next(o for o in operations(cfg, flatten_params(params), t, 128) if o.name == name) for t in (1, 64)
    )
    assert one.nbytes == 2 * 32 * 64
    assert many.nbytes == pytest.approx(4 * one.nbytes, rel=1e-6)
    assert many.flops == 64 * one.flops == 64 * 2 * 32 * 64


def test_apple_s_model_takes_about_what_apple_says():
    # 30 tokens/s and 0.6 ms for a token of a prompt, at 3.7 bits: the shares of the published figures come from that.
    afm = afm_on_device_2024()
    layer = override(afm.decoder.layer, {"input_dim": afm.dim})
    cfg = afm.set(decoder=SequenceConfig(layers=(layer,) * 26))

    def stored(*shape: int) -> Scaled:  # in 4 bits, of one number in memory
        return Scaled(np.broadcast_to(np.int8(0), shape), np.ones((1, 1), np.float16), 4)

    of_shape = functools.cache(stored)
    shapes = {"embedding.weight": (49152, 3072)}
    for i in range(26):
        attention, feed_forward = f"decoder.layers.{i}.attention", f"decoder.layers.{i}.feed_forward"
        shapes |= {f"{attention}.{p}.weight": (3072, 3072) for p in ("q_proj", "o_proj")}
        shapes |= {f"{attention}.{p}.weight": (3072, 1024) for p in ("k_proj", "v_proj")}
        shapes |= {f"{feed_forward}.{p}.weight": (3072, 8064) for p in ("gate_proj", "up_proj", "down_proj")}
    weights = {name: of_shape(*shape) for name, shape in shapes.items()}
    assert sum(int(np.prod(s)) for s in shapes.values()) == pytest.approx(2_737_739_264, rel=1e-3)
    one = sum(o.seconds(_A17) for o in operations(cfg, weights, 1, 512))
    prompt = sum(o.seconds(_A17) for o in operations(cfg, weights, 512, 512)) / 512
    assert 1 / one == pytest.approx(30 * 3.7 / 4, rel=0.15)
    assert prompt == pytest.approx(0.6e-3, rel=0.15)


def test_the_command_prints_a_table_and_writes_a_page(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    assert (
        command.main(
            ["--model", str(model), "--context", "64", "--prefill", "8", "--out", str(tmp_path / "p.html")]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert re.search(r"^M4 +120\.0 +19\.0 +[\d.]+ +\d+ +[\d.]+$", told, re.MULTILINE)
    assert "Estimates, measured on no device" in told
    page = (tmp_path / "p.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["chips"]) == len(CHIPS)
    assert [len(of) for of in data["steps"].values()] == [23, 23]
    assert "src=" not in page
    assert "http" not in page


def test_a_compressed_model_takes_less():
    cfg, params = unrolled(tiny_config(), random_params(tiny_config()))
    plain = flatten_params(params)
    table = Palettized(np.zeros((32, 64), np.uint8), np.zeros((1, 4, 4), np.float16), 2)
    small = plain | {"decoder.layers.0.feed_forward.up_proj.weight": table}
    of_plain, of_small = (sum(o.nbytes for o in operations(cfg, w, 1, 64)) for w in (plain, small))
    assert of_plain - of_small == 2 * 32 * 64 - (512 + 32)  # float16, and two bits with a table of four


def test_mistakes_are_told(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    assert command.main(["--model", str(model), "--context", "0"]) == 2
    assert "--context 0 and --prefill 64: a cache holds at least one token" in capsys.readouterr().err
    assert command.main(["--model", str(tmp_path / "absent")]) == 2
    assert "neither a file, nor a directory" in capsys.readouterr().err
