"""A saved package that is open to be verified, whichever runtime it is for. Import it late: it takes JAX."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import TracebackType
from typing import ClassVar

import numpy as np

from pippin.core.bundle import Bundle
from pippin.export.package_runner import Sizes
from pippin.export.verification import Check, Runner
from pippin.v1 import export_pb2 as pb


class OpenPackage(abc.ABC):
    """A package, and the ways to run it. Use it in a `with` block."""

    runtime: ClassVar[str]  # as manifests call who ran a package here
    sizes: Sizes
    ways: Mapping[str, int]  # name -> units of the last place of float16 that an error must be below

    @abc.abstractmethod
    def checks(self, exported: pb.ExportManifest) -> list[Check]:
        """What is looked at before the program is run."""

    @abc.abstractmethod
    def runner(self, way: str, adapter: np.ndarray | None = None) -> Runner:
        """What runs it, and has read nothing. The one before is no longer of use."""

    def affordable(self, model: Bundle, prompt: int, steps: int) -> tuple[int, int]:
        """So many tokens of a prompt that wants to be read, and of steps, as this machine can run in minutes."""
        return prompt, steps

    def __enter__(self) -> OpenPackage:  # noqa: PYI034  the checks of annotations in tests refuse Self
        return self

    def __exit__(  # noqa: B027  most have nothing to close
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        pass
