"""Room for adapters in a model that is being served."""

import dataclasses
from collections.abc import Mapping

from pippin.core.adapter import Adapter, LowRank
from pippin.core.errors import CheckpointError
from pippin.core.module import Params, flatten_params
from pippin.layers.adapter import unrolled_maps
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.serve.runner import ModelRunner


@dataclasses.dataclass
class AdapterSlots:
    """Reads adapters for a runner's model; see `pippin.serve.adapters.Slots`."""

    runner: ModelRunner
    cfg: CausalLMConfig  # as the model is stored
    shapes: Params  # of its parameters, as they are stored
    signature: str  # of these; who exchanges them sets it

    @property
    def count(self) -> int:
        return self.runner.form.room.count if self.runner.form.room is not None else 0

    def put(self, slot: int, adapter: Adapter) -> None:
        room = self.runner.form.room
        assert room is not None, "who has slots has room"
        if adapter.base_signature != self.signature:
            raise CheckpointError(
                f"{adapter.directory} was made for the model {adapter.base_signature[:12]}, and this one is "
                f"{self.signature[:12]}. Train it on this model."
            )
        if adapter.rank > room.rank:
            raise CheckpointError(
                f"{adapter.directory} has rank {adapter.rank}, and there is room for {room.rank}. Start the server "
                f"with --max-adapter-rank {adapter.rank}."
            )
        maps = adapter.maps()
        self._require_same_stacks(adapter, maps)
        self.runner.put_adapter(slot, unrolled_maps(self.cfg, self.shapes, maps))

    def _require_same_stacks(self, adapter: Adapter, maps: Mapping[str, LowRank]) -> None:
        """Raises CheckpointError where a map is for more or fewer layers than the model has."""
        shapes = {name: leaf.shape for name, leaf in flatten_params(self.shapes).items()}
        for path, pair in maps.items():
            stack, found = shapes.get(f"{path}.weight", pair.down.shape)[:-2], pair.down.shape[:-2]
            if stack != found:
                raise CheckpointError(
                    f"{adapter.directory}: {path} is of a stack of {list(found)}, and the model's is of {list(stack)}. "
                    "Train it on this model."
                )
