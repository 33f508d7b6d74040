"""Guesses of what comes next."""

from pippin.serve.engine.drafter import Drafter


def guess(text, count=4):
    return bytes(Drafter().guess(list(text), count)).decode()


def test_a_text_goes_on_as_it_did_the_last_time():
    assert guess(b"one two. one t") == "wo. "
    assert guess(b"abX abY ab") == "Y ab"


def test_more_tokens_in_common_count_more_than_newness():
    assert guess(b"xab1 ab2 xab", 1) == "1"


def test_nothing_is_guessed_of_what_never_came():
    assert guess(b"abcdef") == guess(b"a") == guess(b"") == ""


def test_no_more_is_guessed_than_is_wanted_or_there():
    assert guess(b"abab", 9) == "ab"
    assert guess(b"one two. one t", 1) == "w"


def test_a_text_that_grows_is_read_on():
    drafter, text = Drafter(), list(b"abcab")
    assert drafter.guess(text, 1) == list(b"c")
    text += b"dxab"
    assert drafter.guess(text, 1) == list(b"d")
