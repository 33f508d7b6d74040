"""Configs of normalisations."""

from pippin.core.config import REQUIRED, Config, Required


class RMSNormConfig(Config, implementation="pippin.layers.norm:RMSNorm", provides="norm"):
    """Division by the root mean square, and a learned scale. The holder sets the dim."""

    dim: Required[int] = REQUIRED
    eps: float = 1e-5
