"""Adapters that lie, and adapters and weights that come and go under traffic, of a server whose draft model guesses."""

import contextlib
import pathlib
import pickle
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from pippin.core.adapter import LowRank, save_adapter
from pippin.v1 import inference_pb2 as pb
from tests.robustness.invariants import answer_in, baseline
from tests.robustness.process import ServerProcess, generate, method_of, wait_for
from tests.robustness.scale import scaled
from tests.robustness.shared import ADAPTERS, adapters_path, model_path, shared_server
from tests.robustness.tiny_model import adapter_maps, base, parameters, save_model

_WEIGHTS, _MANIFEST = "adapter.safetensors", "manifest.textproto"
_Q = "decoder.layer.attention.q_proj"


def _changed(folder: pathlib.Path, **maps: Any) -> None:
    """An adapter with another map of queries."""
    save_adapter(folder, {**adapter_maps(9), _Q: LowRank(**maps)}, base())


def of_another_model(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base()[::-1])
    return "was made for the model .* Train it on this model"


def of_no_model(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), "")
    return "was made for the model"


def of_a_rank_without_room(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9, rank=5), base())
    return "rank 5, and there is room for 4"


def with_a_nan(folder: pathlib.Path) -> str:
    down = np.ones((2, 16, 2), np.float32)
    down[1, 3, 1] = np.nan
    _changed(folder, down=down, up=np.ones((2, 2, 16), np.float32))
    return "NaN or infinity"


def of_integers(folder: pathlib.Path) -> str:
    _changed(folder, down=np.ones((2, 16, 2), np.int32), up=np.ones((2, 2, 16), np.int32))
    return "int32; an adapter is of float32"


def of_pairs_that_do_not_fit(folder: pathlib.Path) -> str:
    _changed(folder, down=np.ones((2, 16, 2), np.float32), up=np.ones((2, 3, 16), np.float32))
    return "they must be"


def of_other_sizes(folder: pathlib.Path) -> str:
    _changed(folder, down=np.ones((2, 15, 2), np.float32), up=np.ones((2, 2, 16), np.float32))
    return "q_proj"


def of_more_layers(folder: pathlib.Path) -> str:
    _changed(folder, down=np.ones((3, 16, 2), np.float32), up=np.ones((3, 2, 16), np.float32))
    return "q_proj"


def of_fewer_layers(folder: pathlib.Path) -> str:
    _changed(folder, down=np.ones((1, 16, 2), np.float32), up=np.ones((1, 2, 16), np.float32))
    return "q_proj"


def of_one_layer_without_a_stack(folder: pathlib.Path) -> str:
    _changed(folder, down=np.ones((16, 2), np.float32), up=np.ones((2, 16), np.float32))
    return "q_proj"


def for_a_map_that_is_not_there(folder: pathlib.Path) -> str:
    save_adapter(folder, {"decoder.layer.attention.z_proj": adapter_maps(9)[_Q]}, base())
    return "z_proj, which the model does not have"


def for_what_is_no_linear_map(folder: pathlib.Path) -> str:
    maps = LowRank(np.ones((272, 2), np.float32), np.ones((2, 16), np.float32))
    save_adapter(folder, {"embedding": maps}, base())
    return "embedding"


def with_a_bit_that_fell_over(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base())
    data = bytearray((folder / _WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / _WEIGHTS).write_bytes(data)
    return "not as it was written|damaged|differs|SHA-256"


def that_ends_early(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base())
    data = (folder / _WEIGHTS).read_bytes()
    (folder / _WEIGHTS).write_bytes(data[: len(data) // 2])
    return "bytes"


def that_is_a_pickle(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base())
    size = (folder / _WEIGHTS).stat().st_size
    (folder / _WEIGHTS).write_bytes(pickle.dumps(pathlib.Path("/")).ljust(size, b"\0"))
    return "."


def whose_manifest_leads_elsewhere(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base())
    text = (folder / _MANIFEST).read_text()
    (folder / _MANIFEST).write_text(text.replace(_WEIGHTS, f"../poems/{_WEIGHTS}"))
    return "."


def whose_manifest_is_cut(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base())
    text = (folder / _MANIFEST).read_text()
    (folder / _MANIFEST).write_text(text[: len(text) // 2])
    return "manifest"


def whose_manifest_is_no_text(folder: pathlib.Path) -> str:
    save_adapter(folder, adapter_maps(9), base())
    (folder / _MANIFEST).write_bytes(b"\xff\x00" * 1000)
    return "manifest"


def that_is_empty(folder: pathlib.Path) -> str:
    folder.mkdir()
    return "manifest"


LIES = [make for name, make in list(globals().items()) if getattr(make, "__module__", None) == __name__
        and name.startswith(("of_", "with_", "for_", "that_", "whose_"))]  # fmt: skip


@contextlib.contextmanager
def _admin(server: ServerProcess) -> Iterator[Any]:
    """Calls a method of Admin by its name."""
    with grpc.insecure_channel(server.admin_address) as channel:
        yield lambda method, **fields: method_of(method, channel)(
            getattr(pb, f"{method}Request")(**fields), timeout=120
        )


@pytest.mark.parametrize("make", LIES, ids=lambda make: make.__name__.replace("_", " "))
def test_an_adapter_that_lies_is_refused_in_a_line_and_takes_no_place(make):
    server, path = shared_server(), adapters_path() / "liar"
    said = make(path)
    try:
        before = baseline(server)
        with _admin(server) as call:
            for _ in range(2):
                with pytest.raises(grpc.RpcError, match=said) as refused:
                    call("LoadAdapter", name="liar")
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION  # pyright: ignore[reportAttributeAccessIssue]
                told = refused.value.details()  # pyright: ignore[reportAttributeAccessIssue]
                assert str(adapters_path()) not in told and "Traceback" not in told and len(told) < 1000
        before.check()
    finally:
        shutil.rmtree(path)
        with contextlib.suppress(grpc.RpcError), _admin(server) as call:
            call("UnloadAdapter", name="liar")  # where it was loaded
    # There is room for another still.
    save_adapter(path, adapter_maps(9, rank=4), base())
    try:
        with _admin(server) as call:
            assert call("LoadAdapter", name="liar").adapter.rank == 4
            call("UnloadAdapter", name="liar")
    finally:
        shutil.rmtree(path)


class _Traffic:
    """Clients that ask for the model and for its adapters, each the same again and again."""

    def __init__(self, server: ServerProcess):
        self._server, self._stop = server, threading.Event()
        self._asked: list[dict[str, Any]] = [
            {"text": f"question {i % 3} " * 4, "seed": i, "temperature": float(i % 2), **of}
            for i, of in enumerate(({}, {}, *({"adapter": name} for name in ADAPTERS for _ in range(2))))
        ]
        self.plain, self.all = range(2), range(len(self._asked))  # numbers of questions
        self.num_refused = 0
        self._num_answers = [0] * len(self._asked)
        self._seen: list[set[tuple[tuple[int, float], ...]]] = [set() for _ in self._asked]
        self._threads = ThreadPoolExecutor(len(self._asked))
        self._clients = [self._threads.submit(self._client, i) for i in self.all]

    def answers(self) -> list[set[tuple[tuple[int, float], ...]]]:
        """Each answer to each question since this was asked last: tokens, and log-probabilities to the last bit."""
        seen, self._seen = self._seen, [set() for _ in self._asked]
        return seen

    def go_on(self, which: Sequence[int]) -> None:
        """Waits for more answers to some of the questions; the first of each may be to what was asked before."""
        until = [self._num_answers[i] + 3 for i in which]
        wait_for(
            lambda: (
                all(self._num_answers[i] >= n for i, n in zip(which, until, strict=True))
                or any(client.done() for client in self._clients)
            ),
            "answers",
        )

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()  # raises what it saw

    def _client(self, i: int) -> None:
        asked = self._asked[i]
        with grpc.insecure_channel(self._server.address) as channel:
            while not self._stop.is_set():
                try:
                    events = generate(channel, max_tokens=30, logprobs=0, ignore_eos=True, **asked)
                except grpc.RpcError as error:
                    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error  # pyright: ignore[reportAttributeAccessIssue]
                    assert f"no adapter '{asked['adapter']}' is loaded" in str(error)
                    self.num_refused += 1
                    continue
                self._seen[i].add(tuple(answer_in(events)))
                self._num_answers[i] += 1


def test_adapters_come_and_go_under_traffic():
    """Into each other's slots: every answer is that of its adapter, or it is said that it is not loaded."""
    server = shared_server()
    before = baseline(server)
    with _Traffic(server) as traffic, _admin(server) as call:
        for _ in range(scaled(5, 200)):
            traffic.go_on(traffic.all)
            for name in ADAPTERS:
                call("UnloadAdapter", name=name)
            traffic.go_on(traffic.plain)
            for name in ADAPTERS[::-1]:
                call("LoadAdapter", name=name)
        traffic.go_on(traffic.all)
    answers = traffic.answers()
    assert [len(seen) for seen in answers] == [1] * 6, "the same question, other answers"
    assert len(set.union(*answers)) == 6
    assert traffic.num_refused > 0
    assert before.check().keys() == {"length"}


def test_weights_are_exchanged_under_traffic():
    """There and back again: an answer is of the old weights or of the new ones, and afterwards all is as before."""
    server, path = shared_server(), model_path()
    before = baseline(server)
    phases = []  # what was answered without adapters: before, in and after each Reload

    with _Traffic(server) as traffic, _admin(server) as call:
        traffic.go_on(traffic.plain)
        with pytest.raises(grpc.RpcError, match="Unload them first") as refused:
            call("Reload")
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION  # pyright: ignore[reportAttributeAccessIssue]
        for name in ADAPTERS:
            call("UnloadAdapter", name=name)
        try:
            for params in (parameters(seed=5), parameters()):
                phases.append(traffic.answers()[:2])
                _replace(path, params)
                traffic.go_on(traffic.plain)
                call("Reload")
                traffic.go_on(traffic.plain)
                phases.append(traffic.answers()[:2])
                traffic.go_on(traffic.plain)
            phases.append(traffic.answers()[:2])
        finally:
            _replace(path, parameters())
        for name in ADAPTERS:
            call("LoadAdapter", name=name)
    old, turn, new, back, again = phases
    assert [len(seen) for phase in (old, new, again) for seen in phase] == [1] * 6
    for i in traffic.plain:
        assert old[i] == again[i] and not old[i] & new[i]
        assert turn[i] == back[i] == old[i] | new[i]
    assert before.check().keys() == {"length"}


def _replace(path: pathlib.Path, params: dict) -> None:
    """Another model in the place of the one at a path."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = save_model(pathlib.Path(folder), params)
        shutil.rmtree(path)
        made.rename(path)
