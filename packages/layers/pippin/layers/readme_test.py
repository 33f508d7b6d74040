"""Every Python block of the README runs, in its order, in the folder of a user who has a model there."""

import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pippin.core.config_tree import traverse
from pippin.core.module import merge, split
from pippin.layers import configs
from pippin.layers.huggingface import save_huggingface
from pippin.layers.models.llama import smollm2_135m

_README = Path(__file__).parents[2] / "README.md"
_BLOCKS = re.findall(r"^```python\n(.*?)^```", _README.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a small model under the name that the README loads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    layer = configs.TransformerLayerConfig(
        attention=configs.GroupedQueryAttentionConfig(
            num_heads=2, num_kv_heads=1, head_dim=4, position=configs.RoPEConfig(theta=10_000.0)
        ),
        feed_forward=configs.FeedForwardConfig(hidden_dim=8),
    )
    cfg = smollm2_135m().set(vocab_size=16, dim=8, decoder=configs.RepeatConfig(layer=layer, num_layers=1))
    save_huggingface("SmolLM2-135M", cfg, split(cfg.build(rngs=nnx.Rngs(0)))[1])
    return tmp_path


def _run(folder: Path, blocks: list[str]) -> dict[str, Any]:
    """The names that a program of these blocks defines. A block that starts with a file's name is that file."""
    program = ""
    for block in blocks:
        if file := re.match(r"# (\w+\.py)\n", block):
            (folder / file[1]).write_text(block)
        else:
            program += block
    (folder / "program.py").write_text(program)
    return runpy.run_path(str(folder / "program.py"))


def test_the_readme_runs_as_it_is_written(folder: Path):
    names = _run(folder, _BLOCKS)
    assert len(names["ids"]) == 5
    assert np.isfinite(names["loss"]) and names["metrics"]["weight"] == 3
    assert names["cache"]["lengths"].tolist() == [5]
    # The user's layer is in the model, with a LoRA around each of its maps.
    mine: list[Any] = [c for _, c in traverse(names["mine"]) if type(c).__qualname__ == "SquaredReLU.Config"]
    assert [(c.hidden_dim, type(c.proj)) for c in mine] == [(96, configs.LoRALinearConfig)]
    assert names["logits"].shape == (1, 4, 256)
    assert names["continued"].shape == (2, 3, 256)


def test_every_change_that_the_readme_makes_gives_a_model_that_computes(folder: Path):
    changes = next(block for block in _BLOCKS if "experts = replace" in block)
    names = _run(folder, [_BLOCKS[0], changes])
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    for name in re.findall(r"^(\w+) = ", changes, flags=re.MULTILINE):
        definition, params = split(nnx.eval_shape(lambda name=name: names[name].build(rngs=nnx.Rngs(0))))
        logits = jax.eval_shape(lambda p, t, d=definition: merge(d, p)(t), params, tokens)
        assert logits.shape == (1, 4, 256)
