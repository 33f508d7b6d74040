import math
import os
import sysconfig
from pathlib import Path

import pytest

from pippin.core.errors import DataError
from pippin.train.input.config import FilesConfig, StdlibConfig
from pippin.train.input.reading import Part, Split, TextFile
from pippin.train.input.rejects import Rejects
from pippin.train.input.sources import content_digest
from pippin.train.input.testing import write_rows


def _files(pattern: Path | str, **fields: str):
    source = FilesConfig(glob=str(pattern), **fields).build()
    return source, source.files()


def _documents(source: object, files: object, split: Split) -> list[str]:
    rejects = Rejects()
    return [part.text for part in source.parts(files, split, rejects)]  # type: ignore[attr-defined]


def test_the_standard_library_is_split_by_file() -> None:
    source = StdlibConfig().build()
    files = source.files()
    names = {file.name for file in files}
    assert {"os.py", "json/decoder.py"} < names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    heldout = {file.name for file in files if Split(True, 20).has(file, 0)}
    train = {file.name for file in files if Split(False, 20).has(file, 0)}
    assert heldout | train == names and not heldout & train
    assert 0.02 < len(heldout) / len(names) < 0.1
    assert len(StdlibConfig(include_tests=True).build().files()) > len(files)


def test_a_document_of_the_standard_library_is_a_file() -> None:
    source = StdlibConfig().build()
    file = next(file for file in source.files() if file.name == "types.py")
    split = next(split for split in (Split(False, 20), Split(True, 20)) if split.has(file, 0))
    text = "".join(_documents(source, [file], split))
    assert text == Path(sysconfig.get_path("stdlib"), "types.py").read_text(encoding="utf-8")


def test_the_order_of_files_depends_on_their_names_alone(tmp_path: Path) -> None:
    for folder in ("here", "there/deeper"):
        for name in ("a/1.jsonl", "a/2.jsonl", "b/1.jsonl", "b/2.jsonl"):
            write_rows(tmp_path / folder / name, ["x"])
    orders = [
        [file.name for file in _files(tmp_path / f / "**/*.jsonl")[1]] for f in ("here", "there/deeper")
    ]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl", "b/2.jsonl"]


def test_files_of_all_formats_are_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["from jsonl"])
    (tmp_path / "b.txt").write_text("from txt")
    source, files = _files(tmp_path / "*")
    documents = [_documents(source, files, split) for split in (Split(False, 2), Split(True, 2))]
    assert sorted([*documents[0], *documents[1]]) == ["from jsonl", "from txt"]


def test_a_single_short_text_has_a_held_out_part(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a short text\n" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    source, files = _files(tmp_path / "a.txt")
    train, heldout = (_documents(source, files, Split(side, 20)) for side in (False, True))
    assert sum(map(len, train)) + sum(map(len, heldout)) == len(text)
    assert 0.02 < sum(map(len, heldout)) / len(text) < 0.15


def test_many_texts_are_held_out_whole(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 300)
    source, files = _files(tmp_path / "*.txt")
    rejects = Rejects()
    parts = [part for side in (False, True) for part in source.parts(files, Split(side, 20), rejects)]
    assert sorted(part.text for part in parts) == sorted(f"text {i}\n" * 300 for i in range(40))
    assert all(part == Part(part.text) for part in parts)
    assert len(_documents(source, files, Split(True, 20))) == 2


@pytest.mark.parametrize("count", [40, 41, 59, 60, 61, 90])
def test_so_many_texts_are_held_out_as_they_are_many(tmp_path: Path, count: int) -> None:
    for seed in range(10):  # names that would all be on one side by chance
        files = [TextFile(tmp_path / f"{seed}-{i}.txt", f"{seed}-{i}.txt") for i in range(count)]
        heldout, train = (Split(side, 20).of_files(files) for side in (True, False))
        held = [file for file in files if heldout.has(file, 0)]
        assert len(held) == math.ceil(count / 20)
        assert [file for file in files if not train.has(file, 0)] == held


def test_a_text_more_moves_at_most_one_other(tmp_path: Path) -> None:
    files = [TextFile(tmp_path / f"{i}.txt", f"{i}.txt") for i in range(120)]
    before: set[TextFile] = set()
    for count in range(40, 120):
        split = Split(True, 20).of_files(files[:count])
        now = {file for file in files[:count] if split.has(file, 0)}
        assert count == 40 or len((now ^ before) - {files[count - 1]}) <= 1
        before = now


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none/\*.txt' matches no file, seen from .*Give a path or a pattern"
    ):
        _files(tmp_path / "none" / "*.txt")
    with pytest.raises(DataError, match=rf"Give {tmp_path}/\*\*/\*.txt"):
        _files(tmp_path)


def test_a_format_that_is_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(
        DataError, match="a.pdf is of no format that is read. Name files of .txt, .jsonl, .jsonl.gz"
    ):
        _files(tmp_path / "*")


def test_the_digest_changes_with_contents_and_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "data" / "a.jsonl", ["one"])
    _, files = _files(path)
    before = content_digest(files, tmp_path)
    os.utime(path, ns=(0, 10**18))
    assert content_digest(files, tmp_path) == before
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(0, 10**18 + 1))
    changed = content_digest(files, tmp_path)
    assert changed != before

    def never(_: str) -> str:
        raise AssertionError("a file was read again that had not changed")

    monkeypatch.setattr("pippin.train.input.sources._file_digest", never)
    assert content_digest(files, tmp_path) == changed


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data" / "a.jsonl", ["one"])
    _, files = _files(path)
    stamp = path.stat().st_mtime_ns
    before = content_digest(files, tmp_path)
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(stamp, stamp))  # within one tick of the file system's clock
    assert content_digest(files, tmp_path) != before


def test_a_file_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data" / "a.jsonl", ["one"])
    source, files = _files(path)
    before = content_digest(files, tmp_path)
    path.unlink()
    assert content_digest(files, tmp_path) != before
    rejects = Rejects()
    for side in (False, True):
        assert not list(source.parts(files, Split(side, 2), rejects))
    assert rejects.report.rejected == {"damaged file": 1}
