"""Text streams: whatever the tokens and stops, what comes out is the text up to the first stop, and never too early."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.serve.engine.request import Sampled
from pippin.serve.engine.text import TextStream


def stream(pieces, stops=()):
    """What each token gave, and the stop string that ended the text."""
    text = TextStream(lambda i: pieces[i], stops)
    taken = []
    for i in range(len(pieces)):
        matched = text.add(Sampled(i))
        taken.append(text.take(last=matched is not None or i == len(pieces) - 1))
        if matched is not None:
            return taken, matched
    return taken, None


def texts(taken):
    return [text for text, _ in taken]


def test_half_a_character_waits_for_its_other_half():
    taken, _ = stream([b"a\xc3", b"\xa9b", b"\xe2\x82", b"\xac"])
    assert texts(taken) == ["a", "éb", "", "€"]
    assert [[s.token for s in tokens] for _, tokens in taken] == [[], [0, 1], [], [2, 3]]


def test_half_a_character_at_the_end_is_left_out():
    taken, _ = stream([b"a", b"\xe2\x82"])
    assert texts(taken) == ["a", ""]
    assert [s.token for s in taken[-1][1]] == [1]


def test_bytes_that_are_no_text_are_replaced():
    taken, _ = stream([b"a\xff", b"b"])
    assert "".join(texts(taken)) == "a\ufffdb"


def test_what_may_become_a_stop_is_held_until_it_did_not():
    taken, matched = stream([b"one\n", b"\n", b"Us", b"ed", b"\n\nUser:", b"!"], ["\n\nUser:"])
    assert texts(taken) == ["one", "", "", "\n\nUsed", ""]
    assert matched == "\n\nUser:"
    assert [s.token for _, tokens in taken for s in tokens] == [0, 1, 2, 3]


def test_text_before_a_stop_in_the_same_token_is_given_out_with_it():
    taken, matched = stream([b"ab", b"cd.EN", b"D.x"], ["END"])
    assert (texts(taken), matched) == (["ab", "cd.", ""], "END")
    assert [s.token for _, tokens in taken for s in tokens] == [0, 1]


def test_the_stop_that_ends_first_wins():
    assert stream([b"a", b"bcd"], ["bcd", "bc"])[1] == "bc"


@pytest.mark.parametrize("stops", [(), ("nowhere",)])
def test_tokens_without_text_are_given_out(stops):
    taken, _ = stream([b"", b"a", b""], stops)
    assert [s.token for _, tokens in taken for s in tokens] == [0, 1, 2]


@settings(max_examples=500, deadline=None)
@given(
    st.text(st.sampled_from("abé€\U0001f600"), max_size=40),
    st.lists(st.text(st.sampled_from("abé€"), min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
)
def test_the_pieces_join_to_the_text_before_the_first_stop(text, stops, sizes):
    data, pieces = text.encode(), []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[:size])
        data = data[size:]
    taken, matched = stream(pieces, stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(texts(taken)) == expected
    assert (matched is not None) == bool(ends)
    told = [s.token for _, tokens in taken for s in tokens]
    assert told == list(range(len(told)))
    # Of the tokens told so far, all text was given out.
    so_far, bytes_told = "", 0
    for piece, tokens in taken[:-1]:
        so_far += piece
        bytes_told += sum(len(pieces[s.token]) for s in tokens)
        assert bytes_told <= len(so_far.encode())
