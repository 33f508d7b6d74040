"""Arrays of a checkpoint on disk: read part by part, every part checked. No JAX.

Orbax writes each array as a Zarr 3 array, a file a chunk. It reads a flipped
bit, and TensorStore reads an absent chunk as zeros, without a word: so nothing
here is returned before its SHA-256 was compared with the manifest's.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 and its kind by it
import numpy as np
import tensorstore

from pippin.core import manifest
from pippin.core.manifest import DamageError
from pippin.v1 import model_pb2 as pb

FOLDER = "arrays"

Index = tuple[slice, ...]  # with start and stop, one a dim

_READERS = 8
_TENSORSTORE_ERRORS = (LookupError, OSError, RuntimeError, ValueError)  # what its statuses map to


def array_sha256(values: np.ndarray) -> str:
    """The SHA-256 of an array's values: little-endian, in row-major order."""
    data = np.asarray(values, order="C")
    return hashlib.sha256(data.reshape(-1).view(np.uint8).data).hexdigest()


def chunk_index(chunk: pb.ArrayChunk) -> Index:
    """Where a chunk lies in its array."""
    return tuple(slice(s, s + n) for s, n in zip(chunk.start, chunk.shape, strict=True))


def chunk_file(name: str, start: Iterable[int], shape: Iterable[int]) -> str:
    """The file of a chunk, relative to its step: Zarr numbers the chunks of a grid in each dim."""
    grid = [str(s // n) for s, n in zip(start, shape, strict=True)]
    return "/".join([FOLDER, name, "c", *grid])


class StoredArray:
    """An array of a step."""

    def __init__(self, step_folder: Path, entry: pb.CheckpointArray):
        self.name = entry.name
        self.shape = tuple(entry.shape)
        self.dtype = np.dtype(entry.dtype)
        self._folder = step_folder
        self._entry = entry

    def read(self) -> np.ndarray:
        """The whole array.

        Raises:
            DamageError: a file of it is not as it was written.
        """
        return self.read_parts([tuple(slice(0, n) for n in self.shape)])[0]

    def read_parts(self, indices: list[Index]) -> list[np.ndarray]:
        """Some parts of the array. Each chunk that they touch is read once, checked, and let go.

        Raises:
            DamageError: a file of them is not as it was written.
        """
        parts: list[np.ndarray | None] = [None] * len(indices)
        problems = []
        store = None
        for chunk in self._entry.chunks:
            place = chunk_index(chunk)
            shared = [_overlap(place, index) for index in indices]
            if not any(s is not None for s in shared):
                continue
            try:
                store = store or self._open()
                values = self._read_chunk(store, chunk)
            except DamageError as e:
                problems += e.problems
                continue
            for i, (index, overlap) in enumerate(zip(indices, shared, strict=True)):
                if overlap is None:
                    continue
                if index == place:
                    parts[i] = values
                    continue
                if parts[i] is None:
                    parts[i] = np.empty([s.stop - s.start for s in index], self.dtype)
                parts[i][_relative(overlap, index)] = values[_relative(overlap, place)]  # type: ignore[index]
        if problems:
            raise DamageError(self._folder, dict.fromkeys(problems))
        return parts  # type: ignore[return-value]

    def _open(self) -> tensorstore.TensorStore:
        path = f"{FOLDER}/{self.name}"
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self._folder / path}/"}}
        try:
            store = tensorstore.open(spec, open=True, read=True).result()
        except _TENSORSTORE_ERRORS as e:
            raise DamageError(self._folder, [f"{path}/zarr.json: {_first_line(e)}"]) from None
        if store.shape != self.shape or store.dtype.numpy_dtype != self.dtype:
            got = f"{store.dtype.numpy_dtype}{list(store.shape)}, not {self.dtype}{list(self.shape)}"
            raise DamageError(self._folder, [f"{path}/zarr.json: says {got}"])
        return store

    def _read_chunk(self, store: tensorstore.TensorStore, chunk: pb.ArrayChunk) -> np.ndarray:
        problem = manifest.size_problem(self._folder, chunk.file, chunk.bytes)
        if not problem:
            try:
                values = store[chunk_index(chunk)].read(order="C").result()
            except _TENSORSTORE_ERRORS as e:
                problem = f"{chunk.file}: {_first_line(e)}"
            else:
                if array_sha256(values) == chunk.sha256:
                    return values
                problem = f"{chunk.file}: the values do not match their SHA-256"
        raise DamageError(self._folder, [problem])


def read_all(arrays: list[tuple[StoredArray, list[Index]]]) -> list[list[np.ndarray]]:
    """The parts of several arrays, read side by side.

    Raises:
        DamageError: files are not as they were written; it names all of them.
    """
    problems: dict[str, None] = {}
    results = []
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for future in [pool.submit(array.read_parts, indices) for array, indices in arrays]:
            try:
                results.append(future.result())
            except DamageError as e:
                problems |= dict.fromkeys(e.problems)
    if problems:
        raise DamageError(arrays[0][0]._folder, problems)
    return results


def _overlap(a: Index, b: Index) -> Index | None:
    both = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return both if all(s.start < s.stop for s in both) else None


def _relative(index: Index, origin: Index) -> Index:
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(index, origin, strict=True))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
