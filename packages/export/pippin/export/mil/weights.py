"""Constants of a program as they are used: read, decompressed, and kept while there is room."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np

from pippin.export.mil import dtypes
from pippin.export.mil.blob import BlobFile
from pippin.export.mil.program import BlobPlace, Constant
from pippin.export.mil.registry import Tensor


class ConstantReader:
    """Reads constants; floats become numbers of the working type."""

    def __init__(self, files: Mapping[str, BlobFile], work: np.dtype):
        """
        Args:
            files: weight files, as constants name them.
            work: float32 or float64.
        """
        self._files, self._work = files, work

    def read(self, constant: Constant) -> Tensor:
        """The value of a constant."""
        value, kind = constant.value, constant.type
        if isinstance(value, str):
            return Tensor(np.array(value, object), kind.dtype)
        if isinstance(value, BlobPlace):
            file = self._files[value.file]
            value = file.read(file.blob(value.offset)).reshape(kind.shape)
        return Tensor(value.astype(self._work) if dtypes.is_float(kind.dtype) else value, kind.dtype)


class TensorCache:
    """Tensors that were made once, the most recently used ones, up to so many bytes."""

    def __init__(self, max_bytes: int):
        """
        Args:
            max_bytes: of all that are kept.
        """
        self._max_bytes, self._bytes = max_bytes, 0
        self._tensors: OrderedDict[object, list[Tensor]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """The bytes of what is kept."""
        return self._bytes

    def get(self, key: object, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What is kept under a key, or is made now."""
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        made = make()
        size = _size(made)
        if size <= self._max_bytes:
            self._tensors[key] = made
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, dropped = self._tensors.popitem(last=False)
                self._bytes -= _size(dropped)
        return made


def _size(tensors: list[Tensor]) -> int:
    return sum(t.values.nbytes for t in tensors)
