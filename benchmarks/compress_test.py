"""The report of the compression benchmark."""

import pytest

from benchmarks.compress import Row, contenders, page, peer_loss, table, texts


def _row(name, bits, perplexity):
    return Row(name, bits, 10.0, perplexity, 1.0, 2.0, 0.5)


_ROWS = [
    Row("the model", 32.0, 40.0, 10.0, None, None, None),
    _row("allocated, 3.7 bits", 3.5, 10.5),
    _row("coremltools, 4 bits", 4.0, 11.0),
    _row("coremltools, 3 bits", 3.0, 14.0),
]


def test_a_peers_loss_between_its_sizes_lies_on_a_line_of_its_logarithm():
    assert peer_loss(_ROWS, 3.5) == pytest.approx(2.0)  # between 1 and 4
    assert peer_loss(_ROWS, 4.0) == pytest.approx(1.0)
    assert peer_loss(_ROWS, 2.5) is None


def test_the_table_compares_losses_at_equal_size():
    text = table(_ROWS)
    assert "coremltools loses 2.00" in text
    assert "0.25 times that" in text


def test_the_page_needs_no_other_file():
    text = page(_ROWS, "the <table>")
    assert "data:image/png;base64," in text
    assert "the &lt;table&gt;" in text


def test_contenders_have_names_of_their_own():
    names = [c.name for c in contenders([4, 3])]
    assert len(set(names)) == len(names)
    assert names[-1] == "coremltools, 3 bits"
    for i, contender in enumerate(contenders([4])):
        assert not contender.size_of or contender.size_of in names[:i]


@pytest.mark.parametrize("name", ["topics", "stdlib"])
def test_no_text_is_read_both_to_compress_and_to_measure(name):
    read = texts(name)
    assert min(len(read.calibration), len(read.evaluation)) > 1 << 16
    paragraphs = set(read.calibration.split("\n\n"))
    common = [p for p in set(read.evaluation.split("\n\n")) & paragraphs if len(p) > 500]
    assert not common
