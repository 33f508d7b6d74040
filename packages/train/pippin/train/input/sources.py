"""Where text comes from: the standard library of Python, or files of one's own."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

from pippin.core.atomic_file import write_atomic
from pippin.core.errors import DataError
from pippin.train.input.cache import digest
from pippin.train.input.config import FilesConfig, StdlibConfig
from pippin.train.input.reading import Part, Split, TextFile, read_jsonl, read_parquet, read_text
from pippin.train.input.rejects import Rejects

_TEST_DIRS = {"test", "tests", "idle_test"}
_FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@runtime_checkable
class TextSource(Protocol):
    """What provides the interface "text_source"."""

    def files(self) -> list[TextFile]:
        """The files to read."""
        ...

    def settings(self) -> dict[str, object]:
        """What the texts depend on beside the files, as a JSON object."""
        ...

    def parts(self, files: Sequence[TextFile], split: Split, rejects: Rejects) -> Iterator[Part]:
        """The texts of some files on one side of the split; defects go to `rejects`."""
        ...


class StdlibSource:
    """The .py files of the standard library of the interpreter that runs."""

    Config = StdlibConfig

    def __init__(self, cfg: StdlibConfig):
        self._cfg = cfg

    def files(self) -> list[TextFile]:
        """The files, without site-packages.

        Raises:
            DataError: this Python has its library in no directory.
        """
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "__pycache__"} | (
            set() if self._cfg.include_tests else _TEST_DIRS
        )
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - skipped)
            found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        if not found:
            raise DataError(
                f"{root}, the standard library of this Python, holds no .py files. Use a Python that has its "
                "library as source, or train on files of your own."
            )
        return _in_stable_order(found, root)

    def settings(self) -> dict[str, object]:
        return {}

    def parts(self, files: Sequence[TextFile], split: Split, rejects: Rejects) -> Iterator[Part]:
        """The texts of whole files."""
        for file in files:
            yield from read_text(file, split, rejects)


class FilesSource:
    """The files that match a pattern.

    A row is one document; of a text file, the whole or, where there are too few
    text files to hold some of them out, the run of blocks between held-out ones.

    Of the rows or blocks of a file, one in `Split.every` is held out. Of
    `2 * Split.every` text files or more, whole ones are (`Split.of_files`): always
    two at least, and one file more or less moves at most one other.
    """

    Config = FilesConfig

    def __init__(self, cfg: FilesConfig):
        self._cfg = cfg

    def files(self) -> list[TextFile]:
        """The matching files.

        Raises:
            DataError: none matches, or one is of a format that is not read.
        """
        pattern = os.path.expanduser(self._cfg.glob)
        found = [Path(p).absolute() for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not found:
            hint = (
                f"{pattern.rstrip('/')}/**/*.txt"
                if os.path.isdir(pattern)
                else "a path or a pattern of files"
            )
            raise DataError(f"{pattern!r} matches no file, seen from {os.getcwd()}. Give {hint}.")
        for path in sorted(found):
            if not path.name.endswith(_FORMATS):
                raise DataError(
                    f"{path} is of no format that is read. Name files of {', '.join(_FORMATS)} by a pattern "
                    f"such as {path.parent / '*.txt'}, or convert it."
                )
        return _in_stable_order(found, Path(os.path.commonpath([p.parent for p in found])))

    def settings(self) -> dict[str, object]:
        return {"text_field": self._cfg.text_field, "heldout_texts": "by rank"}

    def parts(self, files: Sequence[TextFile], split: Split, rejects: Rejects) -> Iterator[Part]:
        """The texts of the files."""
        texts = [file for file in files if file.path.suffix == ".txt"]
        whole = len(texts) >= 2 * split.every
        block_bytes = None if whole else _block_bytes(texts, split)
        side = split.of_files(texts) if whole else split
        for file in files:
            if file.path.suffix == ".txt":
                yield from read_text(file, side, rejects, block_bytes=block_bytes)
            elif file.path.suffix == ".parquet":
                yield from read_parquet(file, split, rejects, field=self._cfg.text_field)
            else:
                yield from read_jsonl(file, split, rejects, field=self._cfg.text_field)


def _block_bytes(texts: Sequence[TextFile], split: Split) -> int:
    """How long the blocks of text files are, of which one in `split.every` is held out.

    So short that some are held out of little text, and otherwise so long that few
    documents are cut.
    """
    size = sum(file.path.stat().st_size for file in texts)
    return min(16 * 1024, max(256, size // (4 * split.every)))


def _in_stable_order(paths: list[Path], root: Path) -> list[TextFile]:
    """The files, each once, in an order that depends on their names alone and mixes folders."""
    files = {TextFile(path, path.relative_to(root).as_posix()) for path in paths}
    return sorted(files, key=lambda file: (file.number, file.name))


def content_digest(files: Sequence[TextFile], cache_dir: Path) -> str:
    """Hex digits that stand for the names and contents of files, in order.

    The digest of a file is remembered for as long as its size and time of
    change stay the same, so that large files are not read again at each start.
    A file that cannot be read counts as such; whoever reads it next rejects it.
    """
    memory = cache_dir / "digests" / f"{digest([str(file.path) for file in files])}.json"
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        known = {}
    found: dict[str, list[object]] = {}  # path -> [size, time of change in ns, digest]
    settled = time.time_ns() - 2_000_000_000  # a younger file may still change within one tick of its clock
    for file in files:
        path = str(file.path)
        try:
            status = os.stat(path)
            stamp = [status.st_size, status.st_mtime_ns]
            fresh = path in known and known[path][:2] == stamp and status.st_mtime_ns < settled
            found[path] = known[path] if fresh else [*stamp, _file_digest(path)]
        except OSError as e:
            found[path] = [-1, -1, f"not readable: {e.strerror}"]
    if found != known:
        write_atomic(memory, json.dumps(found).encode())
    return digest([[file.name, found[str(file.path)][2]] for file in files])


def _file_digest(path: str) -> str:
    sum_ = blake2b(digest_size=16)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            sum_.update(chunk)
    return sum_.hexdigest()
