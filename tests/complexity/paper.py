"""Table 2 of the AXLearn paper: what adding a feature costs in other systems.

The figures are the paper's estimates, derived by hand in its appendix B for one
variant of each feature, 20 model variants and 10 attention variants. They are no
measurements of ours, nor of anybody's: the paper derives them from the systems'
sources as lower bounds.

Source: arXiv:2507.05411, table 2.
"""

from __future__ import annotations

import dataclasses

MODEL_VARIANTS, ATTENTION_VARIANTS = 20, 10


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Lines changed in existing modules: how they grow, and how many at 20 x 10."""

    order: str
    lines: int

    def at(self, models: int) -> float:
        """The paper's model at another number of model variants, with half as many attention variants.

        O(NM) and O(N) grow in proportion to the system; O(M) and O(1) do not grow with it.
        """
        grows = self.order in ("O(NM)", "O(N)")
        return self.lines * models / MODEL_VARIANTS if grows else float(self.lines)


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the table. None where the system has no such feature."""

    name: str
    rope: Estimate
    moe: Estimate | None


SYSTEMS = (
    System("Megatron-LM", Estimate("O(NM)", 400), Estimate("O(N)", 20)),
    System("DeepSpeed", Estimate("O(NM)", 320), Estimate("O(NM)", 4000)),
    System("TorchTitan", Estimate("O(NM)", 240), Estimate("O(NM)", 400)),
    System("Flax", Estimate("O(NM)", 600), None),
    System("Praxis", Estimate("O(NM)", 300), Estimate("O(M)", 5)),
    System("MaxText", Estimate("O(NM)", 200), Estimate("O(NM)", 300)),
    System("AXLearn", Estimate("O(1)", 0), Estimate("O(1)", 0)),
)
