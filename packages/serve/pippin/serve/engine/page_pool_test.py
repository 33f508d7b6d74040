"""The pool of pages: what is taken, given back, found again, and given up first."""

import pytest

from pippin.serve.engine.page_pool import PagePool, prefix_keys


def test_pages_are_had_once_and_come_back():
    pool = PagePool(3)
    pages = pool.take(3)
    assert sorted(pages) == [0, 1, 2] and pool.num_free == 0
    assert pool.take(1) is None
    pool.release(pages[:1])
    assert pool.take(1) == pages[:1]


def test_a_page_that_is_known_is_found_until_it_is_needed():
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.remember(page, b"key")
    pool.release([page])
    assert pool.find([b"key"]) == [page] and pool.num_free == 1
    pool.release([page])
    pool.take(2)
    assert pool.find([b"key"]) == []


def test_the_least_recently_used_goes_first_and_a_text_from_its_end():
    pool = PagePool(3)
    pages = pool.take(3)
    for page, key in zip(pages, (b"1", b"2", b"3"), strict=True):
        pool.remember(page, key)
    pool.release(pages)
    pool.take(1)
    assert pool.find([b"1", b"2", b"3"]) == pages[:2]


def test_a_beginning_ends_at_the_first_page_that_is_not_known():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.remember(pages[0], b"1")
    pool.remember(pages[1], b"3")
    assert pool.find([b"1", b"2", b"3"]) == pages[:1]


def test_a_key_has_one_page():
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.remember(first, b"key")
    pool.remember(second, b"key")
    pool.release([first, second])
    assert pool.find([b"key"]) == [first]
    assert pool.take(1) == [second]


def test_clear_forgets_all():
    pool = PagePool(2)
    pages = pool.take(2)
    pool.remember(pages[0], b"key")
    pool.release(pages)
    pool.clear()
    assert pool.find([b"key"]) == [] and pool.num_free == 2


def test_a_page_is_released_by_its_user_only():
    with pytest.raises(AssertionError, match="did not use it"):
        PagePool(1).release([0])


def keys_of(tokens, salt="", num_prompt=100, known=()):
    return prefix_keys(tokens, 2, salt, num_prompt=num_prompt, known=known)


def test_keys_are_of_all_that_comes_before():
    keys = keys_of([1, 2, 3, 4, 5])
    assert len(keys) == 2
    assert keys_of([1, 2, 3, 4]) == keys
    assert keys_of([1, 2, 3, 5])[0] == keys[0]
    assert keys_of([1, 2, 3, 5])[1] != keys[1]
    assert not set(keys_of([0, 2, 3, 4])) & set(keys)
    assert not set(keys_of([1, 2, 3, 4], "salt")) & set(keys)
    assert keys_of([1, 2, 3, 4], known=keys[:1]) == keys


def test_pages_of_an_answer_have_keys_of_their_own():
    prompt, answer = keys_of([1, 2, 3, 4]), keys_of([1, 2, 3, 4], num_prompt=3)
    assert prompt[0] == answer[0] and prompt[1] != answer[1]
    assert keys_of([1, 2, 3, 4], num_prompt=2)[1] not in (prompt[1], answer[1])
