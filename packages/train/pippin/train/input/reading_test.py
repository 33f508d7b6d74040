import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pippin.core.errors import DataError
from pippin.train.input.reading import Part, Split, TextFile, read_jsonl, read_parquet, read_text
from pippin.train.input.rejects import Rejects

_SIDES = (Split(False, 2), Split(True, 2))


def _file(path: Path, content: bytes) -> TextFile:
    path.write_bytes(content)
    return TextFile(path, path.name)


def _read_both(read: object, file: TextFile, **settings: object) -> tuple[list[list[str]], Rejects]:
    """The documents of both sides, and all rejects."""
    rejects, sides = Rejects(), []
    for split in _SIDES:
        documents: list[str] = []
        for part in read(file, split, rejects, **settings):  # type: ignore[operator]
            documents[len(documents) if part.starts else len(documents) - 1 :] = [
                part.text if part.starts else documents[-1] + part.text
            ]
        sides.append(documents)
    return sides, rejects


def _all(sides: list[list[str]]) -> list[str]:
    return sorted(sides[0] + sides[1])


def test_each_side_has_its_rows_in_order(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.jsonl", b"".join(b'{"text": "%d"}\n' % i for i in range(6)))
    sides, rejects = _read_both(read_jsonl, file, field="text")
    assert sorted(sides) == [["0", "2", "4"], ["1", "3", "5"]]
    assert rejects.report.documents == 6


def test_the_sides_depend_on_the_name_alone(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    here = _file(tmp_path / "a.jsonl", b'{"text": "0"}\n')
    there = TextFile(tmp_path / "b" / "x.jsonl", "a.jsonl")
    assert [s.has(here, 5) for s in _SIDES] == [s.has(there, 5) for s in _SIDES]
    assert len({TextFile(tmp_path, f"{i}.jsonl").number % 2 for i in range(20)}) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_that_cannot_be_used_are_named_and_counted(tmp_path: Path, name: str) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one"}',
        b'{"text": "two',
        b'{"body": "x", "id": 1}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b"",
        b'["text"]',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "last, without a line end"}',
    ]
    content = b"\n".join(lines)
    file = _file(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    sides, rejects = _read_both(read_jsonl, file, field="text")
    assert _all(sides) == ["last, without a line end", "one"]
    assert rejects.report.rejected == {
        "broken JSON": 3,
        "missing field": 1,
        "field is not text": 1,
        "invalid UTF-8": 2,
        "empty": 1,
    }
    named = sorted(e.removeprefix(f"{file.path}:") for e in rejects.report.examples)
    assert named[0].startswith("10: broken JSON: maximum recursion")
    assert named[1].startswith("2: broken JSON: Unterminated string starting at, column 10")
    assert named[2] == "3: missing field: no field 'text'; it has body, id"
    assert named[3] == "4: field is not text: 'text' is a int, where a string is expected"
    assert named[4].startswith("5: invalid UTF-8: 'utf-8' codec can't decode byte 0xff in position 10")
    assert named[5] == "6: empty: 'text' is an empty text"
    assert named[6] == "8: broken JSON: a list, where an object is expected"
    assert named[7].startswith("9: invalid UTF-8: 'utf-8' codec can't encode character '\\ud800'")


def test_a_long_row_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.train.input.reading._PART_CHARACTERS", 4)
    file = _file(tmp_path / "a.jsonl", b'{"text": "0123456789"}\n{"text": "abcd"}\n')
    parts = [part for split in _SIDES for part in read_jsonl(file, split, Rejects(), field="text")]
    assert sorted(parts) == [
        Part("0123", True, False),
        Part("4567", False, False),
        Part("89", False, True),
        Part("abcd", True, True),
    ]


def test_a_line_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.train.input.reading._MAX_LINE_BYTES", 20)
    file = _file(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b"x" * 70 + b'\n{"text": "b"}\n')
    sides, rejects = _read_both(read_jsonl, file, field="text")
    assert _all(sides) == ["a", "b"]
    assert rejects.report.examples == [f"{file.path}:2: line too long: more than 20 bytes"]


def test_a_damaged_gzip_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {i} {hash(i) % 1009}"}).encode() for i in range(5000)]
    content = gzip.compress(b"\n".join(rows))
    file = _file(tmp_path / "a.jsonl.gz", content[: len(content) // 2])
    sides, rejects = _read_both(read_jsonl, file, field="text")
    read = len(_all(sides))
    assert 0 < read < 5000
    assert rejects.report.rejected == {"damaged file": 1}
    assert rejects.report.examples[0].startswith(
        f"{file.path}:{read + 1}: damaged file: all from here on is not read"
    )
    not_gzip = _file(tmp_path / "b.jsonl.gz", b"plain")
    assert "Not a gzipped file" in _read_both(read_jsonl, not_gzip, field="text")[1].report.examples[0]


@pytest.mark.parametrize("read", [read_text, read_jsonl])
def test_an_empty_file_and_one_that_is_missing_are_rejects(tmp_path: Path, read: object) -> None:
    fields = {} if read is read_text else {"field": "text"}
    file = _file(tmp_path / "a.txt", b"")
    assert _read_both(read, file, **fields)[1].report.examples == [
        f"{file.path}: empty: the file has no text"
    ]
    missing = TextFile(tmp_path / "b.txt", "b.txt")
    _, rejects = _read_both(read, missing, **fields)
    assert rejects.report.rejected == {"damaged file": 1}
    assert "No such file" in rejects.report.examples[0]


def test_a_whole_text_file_is_one_document_on_one_side(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\r\n" for i in range(20_000)) + "the end"
    sides, rejects = _read_both(read_text, _file(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode()))
    assert sorted(sides) == [[], [text]]
    assert (rejects.report.documents, rejects.report.bytes) == (1, len(text.encode()))


@given(
    st.lists(st.sampled_from(["a", "é", "\n", "👩\u200d👧", "\r\n", "word ", "x" * 40]), max_size=60),
    st.integers(4, 50),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_blocks_of_both_sides_are_the_text(tmp_path: Path, pieces: list[str], block_bytes: int) -> None:
    text = "".join(pieces)
    file = _file(tmp_path / "a.txt", text.encode())
    parts: list[list[Part]] = []
    rejects = Rejects()
    for split in _SIDES:
        parts.append(list(read_text(file, split, rejects, block_bytes=block_bytes)))
    # With every second block held out, the sides alternate, and no document goes on.
    assert all(part.starts and part.ends for side in parts for part in side)
    longer, shorter = sorted(parts, key=len, reverse=True)
    for order in ([longer, shorter], [shorter, longer]):
        merged = "".join(order[i % 2][i // 2].text for i in range(2 * len(shorter)))
        if merged + "".join(part.text for part in longer[len(shorter) :]) == text:
            break
    else:
        pytest.fail("the blocks of both sides, in turns, are not the text")
    assert sum(rejects.report.rejected.values()) == (not text)


def test_blocks_between_held_out_ones_are_one_document(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.txt", b"".join(b"%03d\n" % i for i in range(40)))
    rejects = Rejects()
    parts = list(read_text(file, Split(False, 10), rejects, block_bytes=8))  # two lines a block, 20 blocks
    documents = "".join(f"{'[' if p.starts else ''}{p.text}{']' if p.ends else ''}" for p in parts).split(
        "]["
    )
    held_out = list(read_text(file, Split(True, 10), rejects, block_bytes=8))
    assert len(held_out) == 2 and all(p.starts and p.ends and len(p.text) == 8 for p in held_out)
    assert len(documents) in (2, 3)
    assert rejects.report.documents == len(documents) + 2


def test_lines_that_are_not_utf8_are_left_out_and_named(tmp_path: Path) -> None:
    content = b"first\n" * 10_000 + b"bad \xff\n" + b"last\n" * 10_000
    sides, rejects = _read_both(read_text, _file(tmp_path / "a.txt", content))
    assert _all(sides) == ["first\n" * 10_000 + "last\n" * 10_000]
    assert rejects.report.rejected == {"invalid UTF-8": 1}
    assert rejects.report.examples[0].startswith(f"{tmp_path / 'a.txt'}:10001: invalid UTF-8: ")


def _parquet(path: Path, table: pa.Table) -> TextFile:
    pq.write_table(table, path, row_group_size=100)
    return TextFile(path, path.name)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
)
def test_parquet_rows_are_texts(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["ä", None, "", *(f"row {i}" for i in range(300))]
    column = pa.array(texts, pa.string()).cast(pa.binary() if kind == pa.binary() else pa.string()).cast(kind)
    file = _parquet(tmp_path / "a.parquet", pa.table({"id": list(range(303)), "text": column}))
    sides, rejects = _read_both(read_parquet, file, field="text")
    assert _all(sides) == sorted(["ä", *texts[3:]])
    assert sorted(rejects.report.examples) == [
        f"{file.path}:2: missing field: 'text' is null",
        f"{file.path}:3: empty: 'text' is an empty text",
    ]


def test_parquet_defects_are_named(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    file = _parquet(tmp_path / "a.parquet", pa.table({"text": bad}))
    sides, rejects = _read_both(read_parquet, file, field="text")
    assert _all(sides) == ["good"]
    assert rejects.report.examples[0].startswith(f"{file.path}:2: invalid UTF-8: ")
    file = _parquet(tmp_path / "b.parquet", pa.table({"body": ["x"]}))
    _, rejects = _read_both(read_parquet, file, field="text")
    assert rejects.report.examples == [f"{file.path}: missing field: no column 'text'; it has body"]
    file = _parquet(tmp_path / "c.parquet", pa.table({"text": [1]}))
    _, rejects = _read_both(read_parquet, file, field="text")
    assert rejects.report.examples[0].endswith(
        ":1: field is not text: 'text' is a int, where a string is expected"
    )
    file = _parquet(tmp_path / "d.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert _read_both(read_parquet, file, field="text")[1].report.examples == [
        f"{file.path}: empty: the file has no rows"
    ]


def test_a_damaged_parquet_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", pa.table({"text": [f"row {i}" for i in range(1000)]}))
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    file.path.write_bytes(content)
    sides, rejects = _read_both(read_parquet, file, field="text")
    assert len(_all(sides)) < 1000
    assert rejects.report.rejected == {"damaged file": 1}
    file.path.write_bytes(content[:100])
    assert "damaged file" in _read_both(read_parquet, file, field="text")[1].report.examples[0]


def test_the_first_reject_is_an_error_where_none_is_allowed(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.jsonl", b'{"text": "one"}\n{\n{"text": "two"}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl:2: broken JSON: .*Mend or remove it, or set bad_input=skip"
    ):
        for split in _SIDES:
            list(read_jsonl(file, split, Rejects(fatal=True), field="text"))


def test_all_rejects_are_listed_and_the_first_are_named(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.jsonl", b"{\n" * 100)
    rejects = Rejects(listing=tmp_path / "rejected.txt")
    for split in _SIDES:
        assert not list(read_jsonl(file, split, rejects, field="text"))
    rejects.close()
    assert len((tmp_path / "rejected.txt").read_text().splitlines()) == 100
    text = rejects.report.text()
    assert text.startswith("0 documents, 0.0 MB; rejected: 100 broken JSON\n")
    assert len(text.splitlines()) == 5 and text.endswith("\n  and 97 more")
    assert rejects.report.text("a/list.txt").endswith("\n  and 97 more; all are named in a/list.txt")


def test_few_rejects_are_all_named_and_no_list_is(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.jsonl", b"{\n" * 3)
    rejects = Rejects()
    for split in _SIDES:
        assert not list(read_jsonl(file, split, rejects, field="text"))
    text = rejects.report.text("a/list.txt")
    assert len(text.splitlines()) == 4 and "more" not in text
