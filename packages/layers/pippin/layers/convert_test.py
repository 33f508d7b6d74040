from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle, save_bundle
from pippin.core.module import flatten_params, split
from pippin.layers import convert
from pippin.layers.models.afm_on_device_2024 import afm_on_device_2024
from pippin.layers.models.llama import llama
from pippin.layers.position_config import RoPEConfig

_SIZES = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "hidden_dim": 12}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    cfg = llama(vocab_size=16, dim=8, tied=True, position=RoPEConfig(theta=1e4), **_SIZES)
    params = split(cfg.build(rngs=nnx.Rngs(0)))[1]
    return save_bundle(tmp_path / "bundle", cfg, params)


def test_a_model_comes_back_bit_for_bit_from_hugging_face_s_form(bundle: Path, tmp_path: Path) -> None:
    assert convert.main([str(bundle), str(tmp_path / "theirs"), "--to", "huggingface"]) == 0
    assert (tmp_path / "theirs" / "config.json").exists()
    assert convert.main([str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    before, after = load_bundle(bundle), load_bundle(tmp_path / "ours")
    old, new = flatten_params(before.params()), flatten_params(after.params())
    assert old.keys() == new.keys()
    for path, values in old.items():
        np.testing.assert_array_equal(values, new[path])
    assert before.component.decoder == after.component.decoder


def test_a_model_that_their_config_cannot_describe_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = afm_on_device_2024(vocab_size=16, dim=8, **_SIZES)
    save_bundle(tmp_path / "afm", cfg, split(cfg.build(rngs=nnx.Rngs(0)))[1])
    assert convert.main([str(tmp_path / "afm"), str(tmp_path / "theirs"), "--to", "huggingface"]) == 2
    assert "qk_norm_order" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["afm"]


def test_mistakes_are_told_without_a_stack_trace(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(tmp_path / "absent"), str(tmp_path / "x")]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert convert.main([str(bundle), str(bundle)]) == 2
    assert "is there already" in capsys.readouterr().err
