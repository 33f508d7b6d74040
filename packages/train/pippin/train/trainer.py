"""The parts of a training run, built from its config and put on the mesh. The order of things is in loop.py."""

import contextlib
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pippin.core.batch import Batch
from pippin.core.errors import ConfigError, ShardingError
from pippin.core.module import Params, flatten_params, parameter_infos, split, unflatten_params
from pippin.core.registry import component_name
from pippin.core.sharding import use_mesh
from pippin.core.tokenizer import tokenizer_digest
from pippin.layers.adapter import lora_scales, without_lora
from pippin.layers.model_files import open_model
from pippin.layers.quant.settle import factor_paths
from pippin.train.step import TrainState, make_step
from pippin.train.trainer_config import TrainerConfig

# How many, at most, and of which task (None: of each in turn) -> held-out batches, the same each time.
Batches = Callable[[int, str | None], Iterable[Batch]]


class Trainer:
    """A model's definition, learner, mesh and compiled step. It holds no training state."""

    Config = TrainerConfig

    def __init__(self, cfg: TrainerConfig, *, held_out: Batches, mesh: jax.sharding.Mesh | None = None):
        """
        Args:
            cfg: the run.
            held_out: batches for the evaluators.
            mesh: the config's, of devices that are not here; None: of all that there are.

        Raises:
            ConfigError: the parts do not fit each other.
            ShardingError: the mesh does not fit the devices.
        """
        names = [e.name for e in cfg.evaluators]
        if len(set(names)) < len(names):
            raise ConfigError(f"evaluators are named {names}: give each a name of its own.")
        self.cfg = cfg
        self.mesh = cfg.mesh.make() if mesh is None else mesh
        _require_even_batch(cfg, self.mesh)
        _require_pipeline(cfg, self.mesh)
        abstract = nnx.eval_shape(lambda: cfg.model.build(rngs=nnx.Rngs(0)))
        self.definition, shapes = split(abstract)
        self.infos = parameter_infos(abstract)
        self.learner = cfg.learner.build(infos=self.infos, total_steps=cfg.steps)
        self.evaluators = {
            e.name: e.build(definition=self.definition, batches=held_out, place=self.place)
            for e in cfg.evaluators
        }
        self._sharding = self._state_shardings(shapes)
        self._batch_sharding = self._named(
            ("batch", "sequence"), (cfg.input.batch_size, cfg.input.sequence_length)
        )

    @property
    def parameter_paths(self) -> tuple[str, ...]:
        """Where the state has the parameters that are measured, for a checkpoint: later ones hide earlier ones."""
        return ("params", "learner.ema") if self.template.learner.ema else ("params",)

    def measured(self, state: TrainState) -> Params:
        """The parameters that a run is judged by: averaged ones, where the learner averages."""
        return self.learner.ema(state.learner, state.params) or state.params

    @property
    def num_params(self) -> int:
        """How many numbers the model has learned."""
        return sum(int(np.prod(i.shape)) for i in jax.tree.leaves(self.infos))

    def init(self, tokenizer: Path) -> TrainState:
        """The state before the first step, on the devices that hold it.

        Args:
            tokenizer: the folder of the run's tokenizer, which must be that of `init_from`.

        Raises:
            ConfigError: the model or the tokenizer of `init_from` is another one.
            CheckpointError: `init_from` holds no model, or a damaged one.
        """
        if self.cfg.init_from is None:
            return jax.jit(self._init, out_shardings=self._sharding)()
        params = jax.tree.map(jax.device_put, self._first_params(tokenizer), self._sharding.params)
        return jax.jit(self._state, out_shardings=self._sharding)(params)

    def _first_params(self, tokenizer: Path) -> Params:
        """The parameters of `init_from`, as NumPy arrays."""
        source = open_model(self.cfg.init_from or "")
        if source.tokenizer and tokenizer_digest(source.tokenizer) != tokenizer_digest(tokenizer):
            raise ConfigError(
                f"init_from {source.directory} was trained with another tokenizer, so its ids mean other text. "
                f"Use its own: --set input.tokenizer=TokenizerFiles --set input.tokenizer.directory={source.tokenizer}."
            )
        # LoRA layers that are not there start as they would anyway: without effect. So do scales of rounded weights.
        added = {} if lora_scales(source.component) else lora_scales(self.cfg.model)
        infos = flatten_params(self.infos)
        names = {path: without_lora(path, added) for path in infos}
        fresh = {path for path in names if path.rpartition(".")[0] in added}
        fresh |= factor_paths(self.cfg.model) - source.weights.keys()
        ours = {names[path]: info.shape for path, info in infos.items() if path not in fresh}
        theirs = {path: weight.shape for path, weight in source.weights.items()}
        if ours != theirs:
            differing = sorted(p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))
            path = differing[0]
            raise ConfigError(
                f"init_from {source.directory} holds another model: {len(differing)} parameters differ, such as "
                f"{path}, of shape {theirs.get(path, 'none')} there and {ours.get(path, 'none')} here. "
                "Train a model of the same sizes, or leave out init_from."
            )
        drawn = jax.jit(
            lambda: {p: a for p, a in flatten_params(self._init().params).items() if p in fresh}
        )()
        return unflatten_params(
            {
                path: np.asarray(drawn[path])
                if path in fresh
                else source.weights[name].read().astype(np.float32)
                for path, name in names.items()
            }
        )

    @cached_property
    def template(self) -> TrainState:
        """The state's shapes, dtypes and shardings: what a checkpoint is loaded into."""
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            jax.eval_shape(self._init),
            self._sharding,
        )

    def compile(self) -> jax.stages.Compiled:
        """The compiled step, `(state, batch) -> (state, metrics)`: it takes over the state that it is given."""
        return self.trace().lower().compile()

    def trace(self) -> jax.stages.Traced:
        """The step before it is compiled, for the devices of the mesh, which need not be there."""
        rows, length = self.cfg.input.batch_size, self.cfg.input.sequence_length
        batch = abstract_batch(rows, length, self._batch_sharding)
        step = make_step(self.definition, self.learner, self.cfg.learner.microbatches)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self._sharding, None))
        with self.on_mesh():
            return jitted.trace(self.template, batch)

    def on_mesh(self) -> contextlib.AbstractContextManager[None]:
        """Where the model is traced: splits activations over the mesh, and tells layers its platform."""
        alone = self.mesh.size == 1 and self.mesh.devices.flat[0].platform == jax.default_backend()
        return contextlib.nullcontext() if alone else use_mesh(self.cfg.mesh, self.mesh)

    def place(self, batch: Batch) -> Batch:
        """A batch on the devices, from this process's rows of it (`cluster.share`)."""
        rows = self.cfg.input.batch_size
        arrays = {name: np.asarray(value) for name, value in batch.items()}
        return {  # type: ignore[return-value]
            name: jax.make_array_from_process_local_data(
                self._batch_sharding, value, (rows, *value.shape[1:])
            )
            for name, value in arrays.items()
        }

    def require_vocabulary(self, size: int) -> None:
        """Raises `ConfigError` unless the model has a vector for each id of a tokenizer."""
        if self.cfg.model.vocab_size < size:
            raise ConfigError(
                f"the tokenizer has {size} ids, and model.vocab_size is {self.cfg.model.vocab_size}: every id needs a "
                f"vector. Set model.vocab_size to {size} or more, or use a smaller tokenizer."
            )

    def _init(self) -> TrainState:
        model = self.cfg.model.build(rngs=nnx.Rngs(params=self.cfg.seed))
        return self._state(split(model)[1])

    def _state(self, params: Params) -> TrainState:
        return TrainState(jnp.zeros([], jnp.int32), params, self.learner.init(params))

    def _named(
        self, axes: tuple[str | None, ...] = (), shape: tuple[int, ...] = ()
    ) -> jax.sharding.NamedSharding:
        return self.cfg.mesh.sharding(self.mesh, axes, shape)

    def _state_shardings(self, shapes: Any) -> TrainState:
        whole = self._named()
        learner = jax.eval_shape(self.learner.init, shapes)
        return TrainState(
            whole,  # type: ignore[arg-type]
            jax.tree.map(lambda info: self._named(info.axes, info.shape), self.infos),
            self.learner.map_state(
                learner, lambda leaf, info: self._named(info.axes, leaf.shape), lambda leaf: whole
            ),
        )


_BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_weights": jnp.float32,
}


def abstract_batch(rows: int, length: int, sharding: jax.sharding.Sharding | None = None) -> Batch:
    """The shapes and dtypes of a batch."""
    return {  # type: ignore[return-value]
        name: jax.ShapeDtypeStruct((rows, length), kind, sharding=sharding)
        for name, kind in _BATCH_DTYPES.items()
    }


def _require_even_batch(cfg: TrainerConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises `ShardingError` unless every device gets the same number of rows in every microbatch."""
    ways = cfg.mesh.ways("batch", mesh.shape) * cfg.learner.microbatches
    if cfg.input.batch_size % ways:
        raise ShardingError(
            f"input.batch_size ({cfg.input.batch_size}) must be a multiple of {ways}: the mesh splits it over "
            f"{ways // cfg.learner.microbatches} devices, and the learner into {cfg.learner.microbatches} microbatches. "
            f"Set input.batch_size to a multiple of {ways}, or make the mesh smaller."
        )


def _require_pipeline(cfg: TrainerConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises `ConfigError` unless the devices of a pipeline axis have different things to do."""
    decoder, devices = cfg.model.decoder, mesh.shape["pipeline"]
    if devices > 1 and getattr(decoder, "pipeline", None) is None:
        raise ConfigError(
            f"the mesh has {devices} devices on its pipeline axis, and model.decoder ({component_name(type(decoder))}) has no "
            "pipeline: they would all compute the same. Give a Repeat one (--set model.decoder.pipeline=Pipeline --set "
            f"model.decoder.pipeline.microbatches={4 * devices}; in a mesh rule, SetPipeline), or set mesh.pipeline=1."
        )
