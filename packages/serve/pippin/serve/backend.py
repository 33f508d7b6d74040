"""What a server serves."""

import dataclasses

from pippin.serve.engine.engine import Engine
from pippin.serve.served_model import ServedModel


@dataclasses.dataclass(frozen=True)
class Backend:
    """An engine that was not started, and what is known of its model."""

    engine: Engine
    model: ServedModel
