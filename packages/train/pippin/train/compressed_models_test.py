"""Training with the weights that a device will have, and on top of them."""

from pathlib import Path

import numpy as np
from flax import nnx

from pippin.core.bundle import load_bundle, open_model, save_bundle
from pippin.core.module import flatten_params, split, unflatten_params
from pippin.layers.adapter import adapter_of, model_signature
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.quant.fake_quant_config import fake_quantized
from pippin.layers.quant.settle import settled
from pippin.train.job import run_job
from pippin.train.recipes.stdlib_tiny_recovery import recovery
from pippin.train.toy import toy_config


def test_rounded_weights_start_from_a_model_and_are_stored_as_they_were_rounded(tmp_path: Path) -> None:
    base = toy_config(steps=6)
    run_job(base, tmp_path / "base", "toy")
    cfg = base.set(
        init_from=str(tmp_path / "base"),
        model=fake_quantized(group_size=8)(base.model),
        learner=base.learner.set(ema_decay=0.5),
    )
    run_job(cfg, tmp_path / "rounded", "toy")
    trained = open_model(tmp_path / "rounded")
    factors = [w.read() for name, w in trained.weights.items() if name.endswith(".factor")]
    assert factors
    assert all(np.unique(f).size > 1 for f in factors)  # each group has learned its own
    assert isinstance(trained.component, CausalLMConfig)
    save_bundle(tmp_path / "stored", *settled(trained.component, trained.params()))
    assert {a.bits for a in load_bundle(tmp_path / "stored").quantized.values()} == {2, 4}


def test_a_lora_recovers_a_compressed_model_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    base = toy_config(steps=12)
    run_job(base, tmp_path / "base", "toy")
    model = open_model(tmp_path / "base")
    rounding = fake_quantized(group_size=8)(base.model)
    given = flatten_params(split(rounding.build(rngs=nnx.Rngs(0)))[1]) | flatten_params(model.params())
    stored = settled(rounding, unflatten_params(given))
    compressed = load_bundle(save_bundle(tmp_path / "compressed", *stored, tokenizer=model.tokenizer))
    summary = run_job(recovery(base, str(compressed.directory)), tmp_path / "recovered", "toy")
    assert summary.trained < summary.untrained
    maps, signature = adapter_of(open_model(tmp_path / "recovered"))
    assert signature == model_signature(compressed.params())
    assert {path.split(".")[2] for path in maps} == {"0", "1"}  # of each layer
