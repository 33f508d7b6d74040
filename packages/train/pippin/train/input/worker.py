"""The packing process: trains the tokenizer and fills the stores, while another process reads them.

    python -m pippin.train.input.worker

It takes one line of JSON on its standard input (see `PackingProcess`), and dies when
that is closed, as happens however its parent dies. Where the user's text is at
fault it ends with one line of JSON on its standard output, {"error": text}.

Importing seqio takes seconds of CPU time; here it overlaps with the training of
the tokenizer, and in the parent with the import of JAX and compilation. The
accelerator belongs to the parent: none is visible here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pippin.core.component import from_text
from pippin.core.errors import PippinError
from pippin.core.tokenizer import load_tokenizer
from pippin.train.input.cache import locked
from pippin.train.input.config import BadInput, TextInputConfig
from pippin.train.input.plan import Plan


def main() -> int:
    """Does the job that standard input says; the exit status."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        _run(job)
    except PippinError as e:
        answer.write(json.dumps({"error": str(e)}) + "\n")
        answer.flush()
        return 1
    return 0


def _die_with_parent() -> None:
    # Not sys.stdin, whose lock this thread would still hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def _run(job: dict[str, Any]) -> None:
    for name, file in job["modules"].items():
        _import(name, file)  # registers the configs of the tree
    cfg = from_text(job["config"])
    assert isinstance(cfg, TextInputConfig)
    plan = Plan(cfg, Path(job["cache_dir"]), Path(job["tokenizer_dir"]) if job["tokenizer_dir"] else None)
    _train_tokenizer(plan)
    # By directory, as two tasks of the same text share their stores.
    stores = list({store.directory: store for store in plan.stores() if not store.complete()}.values())
    with contextlib.ExitStack() as stack:
        # In one order in all processes, so that no two wait for each other.
        for store in sorted(stores, key=lambda store: store.directory):
            stack.enter_context(locked(store.directory.with_suffix(".lock")))
        stores = [store for store in stores if not store.complete()]  # another process may have filled them
        if stores:
            from pippin.train.input import seqio_pipeline

            tokenizer, fatal = load_tokenizer(plan.tokenizer_dir), cfg.bad_input is BadInput.FATAL
            # Once training can start, it goes first.
            seqio_pipeline.pack(stores, tokenizer, fatal=fatal, begun=_yield_processor)


def _import(name: str, file: str) -> None:
    """Imports a module by its name or, where that does not lead to its file, from there: a user's recipes."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the package around it
        found = None
    if found is not None and found.origin is not None and os.path.abspath(found.origin) == file:
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the config's implementation is looked up by this name
    spec.loader.exec_module(module)


def _yield_processor() -> None:
    os.nice(10)


def _train_tokenizer(plan: Plan) -> None:
    """Trains the tokenizer if need be, and imports seqio meanwhile."""
    if plan.has_tokenizer():
        return
    read = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(plan.train_tokenizer, read)
        # Each text that the trainer reads would wait for the import to let Python's lock go.
        while not read.wait(0.05) and not training.done():
            pass
        if not training.done():
            from pippin.train.input import seqio_pipeline  # noqa: F401
        training.result()


if __name__ == "__main__":
    sys.exit(main())
