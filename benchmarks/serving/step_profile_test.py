from __future__ import annotations

from typing import Any

import pytest

from benchmarks.serving.step_profile import parts


def _event(op: str, start_us: float, us: float, module: str = "jit__step") -> dict[str, Any]:
    return {"ph": "X", "ts": start_us, "dur": us, "args": {"hlo_op": op, "hlo_module": module}}


def test_a_step_is_products_attention_choice_and_what_is_left() -> None:
    names = {"dot.1": "jit(_step)/dot_general", "dot.2": "jit(_step)/while/body/dot_general"}
    events = [
        _event("dot.1", 0, 4000),
        _event("dot.1", 0, 4000),  # another thread, at the same time
        _event("while.1", 4000, 2000),  # what it computes follows
        _event("dot.2", 4000, 2000),
        _event("top_k", 6000, 1000, module="jit__greedy"),
        _event("copy.1", 7000, 1000),
        {"ph": "M", "name": "thread_name"},
    ]
    found = parts(events, names, wall_s=0.010, steps=1)
    assert found == pytest.approx(
        {
            "products": 8 / 12 * 0.008,
            "attention": 2 / 12 * 0.008,
            "choice of tokens": 1 / 12 * 0.008,
            "other": 1 / 12 * 0.008,
            "host": 0.002,
        }
    )
    assert sum(found.values()) == pytest.approx(0.010)
