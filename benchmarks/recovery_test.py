"""The table of the recovery benchmark, and its recipe."""

import math

import numpy as np
import pytest

from benchmarks.recovery import require_made_of, table
from benchmarks.smollm2_recovery import smollm2_recovery
from pippin.core.bundle import save_bundle
from pippin.core.config_tree import config_text
from pippin.core.errors import CheckpointError
from pippin.core.manifest import provenance


def test_what_is_won_back_is_of_the_distance_to_the_model_with_the_same_adapter():
    text = table((10.0, 8.0), (20.0, 10.0), "some", 3)
    nats = 1 - math.log(10 / 8) / math.log(2)
    assert "2.00" in text and "10.00" in text and "with a LoRA, 3 steps" in text
    assert text.splitlines()[-1].split() == ["won", "back", "80%", f"{nats:.0%}"]


def test_a_bundle_of_another_model_is_no_control(tmp_path):
    cfg = smollm2_recovery().model
    bundle = save_bundle(tmp_path / "b", cfg, {"w": np.ones(2)}, provenance=provenance(source="one"))
    require_made_of(bundle, "one")
    with pytest.raises(CheckpointError, match="was made of one, not of other"):
        require_made_of(bundle, "other")


def test_the_recipe_trains_the_adapter_alone():
    text = config_text(smollm2_recovery())
    assert "rank: 16" in text
    assert "frozen: True" in text
    assert "compressed/smollm2/tokenizer" in text
