"""Reading a model's files anew while it serves: what may change is the weights, and nothing else."""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pippin.core.bundle import Bundle
from pippin.core.config import Config
from pippin.core.config_tree import diff
from pippin.core.errors import PippinError
from pippin.core.module import flatten_params
from pippin.core.tokenizer import load_tokenizer, read_tokenizer_object, token_text, tokenizer_files
from pippin.layers.adapter import model_signature
from pippin.layers.model_files import open_model
from pippin.serve.adapter_slots import AdapterSlots
from pippin.serve.errors import PreconditionError
from pippin.serve.runner import ModelRunner

_log = logging.getLogger(__name__)

_MAX_DIFFERENCES = 8  # that are told
_ONLY_IDS = ("config.json", "generation_config.json")


class Reader:
    """Reads what a runner computes with from the place where it was first read from."""

    def __init__(
        self,
        path: Path,
        bundle: Bundle,
        runner: ModelRunner,
        cast: Callable[[Any], Any],
        slots: AdapterSlots | None = None,
    ):
        """`cast`: parameters as they were read into those of the model that the runner was made of."""
        self._path, self._runner, self._cast, self._slots = path, runner, cast, slots
        self._component, self._tokenizer = bundle.component, _tokenizer_facts(bundle.tokenizer)

    def __call__(self) -> Callable[[], None]:
        """Reads all weights, and checks them; what the result does, between two steps, takes no time.

        Both the old and the new weights are in memory until then.

        Raises:
            PreconditionError: there is no model, it is damaged, or it is another one than is served.
        """
        start = time.monotonic()
        try:
            bundle = open_model(self._path)
            self._require_same(bundle.component, _tokenizer_facts(bundle.tokenizer))
            params = bundle.params()
        except PreconditionError:
            raise
        except PippinError as error:
            _log.warning("the model was not read anew: %s", error)
            # No path of this machine is told.
            text = str(error).replace(str(self._path.absolute()), self._path.name)
            raise PreconditionError(f"The model's files cannot be served: {text}") from error
        _require_finite(params)
        signature = "" if self._slots is None else model_signature(params)
        prepared = self._runner.prepare(self._cast(params))
        jax.block_until_ready(prepared)
        _log.info("the model was read anew: %.1f s", time.monotonic() - start)

        def exchange() -> None:
            self._runner.exchange(prepared)
            if self._slots is not None:
                self._slots.signature = signature

        return exchange

    def _require_same(self, component: Config, tokenizer: dict[str, object]) -> None:
        differences = diff(self._component, component)
        names = sorted({*self._tokenizer, *tokenizer})
        differences += [f"tokenizer: {n}" for n in names if self._tokenizer.get(n) != tokenizer.get(n)]
        if differences:
            told = "; ".join(differences[:_MAX_DIFFERENCES])
            more = len(differences) - _MAX_DIFFERENCES
            raise PreconditionError(
                f"The model's files hold another model than is served: {told}{f'; and {more} more' if more > 0 else ''}. "
                "Start another server for it, and drain this one."
            )


def _require_finite(params: Any) -> None:
    for name, values in flatten_params(params).items():
        if jax.numpy.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise PreconditionError(f"The model's files cannot be served: {name} is not finite.")


def _tokenizer_facts(folder: Path | None) -> dict[str, object]:
    """What a tokenizer and its template make of texts depends on, by name, and on nothing else in the folder.

    Others write there too: beside a Hugging Face model lies the state of its training, and config.json has the version of who
    wrote it. Of that, and of generation_config.json, only ids are read.
    """
    if folder is None:
        return {}
    tokenizer, config_name = load_tokenizer(folder), "tokenizer_config.json"
    config = read_tokenizer_object(folder / config_name)
    return {
        **{
            path.name: hashlib.sha256(path.read_bytes()).digest()
            for path in tokenizer_files(folder)
            if path.name != config_name and path.name not in _ONLY_IDS
        },
        config_name: [
            config.get("add_bos_token"),
            config.get("chat_template"),
            {name: token_text(value) for name, value in config.items() if name.endswith("_token")},
        ],
        "special ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.start_ids],
        "ids that end a text": tokenizer.eos_ids,
    }
