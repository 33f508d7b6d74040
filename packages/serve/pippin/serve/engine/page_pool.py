"""Which pages of the key-value cache are in use, and which hold the beginnings of texts that may come again."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def prefix_keys(
    tokens: Sequence[int], page_size: int, salt: str, *, num_prompt: int, known: Sequence[bytes] = ()
) -> list[bytes]:
    """A key for each full page of a text: of its tokens, of all before them, and of the salt.

    Args:
        tokens: of the text.
        page_size: tokens a page.
        salt: texts of different salts share nothing.
        num_prompt: of the text. A page that holds later tokens is found by texts only whose prompt ends there too.
        known: keys of the first pages, which are not made again.
    """
    keys = list(known)
    key = (
        keys[-1] if keys else hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    )
    for start in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        stop = start + page_size
        page = np.asarray(tokens[start:stop], np.int64).tobytes()
        of_prompt = b"" if stop <= num_prompt else num_prompt.to_bytes(8, "little")
        key = hashlib.blake2b(key + page + of_prompt, digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """Counts who uses each page. Pages that nobody uses keep what they hold until they are needed, oldest first.

    A page is empty, idle (nobody uses it, and its key is known), or in use by as many as took it.

    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.3 (shared prefixes); Zheng et al. 2023, arXiv:2312.07104,
    section 3 (keeping them after a request, and giving up the least recently used).
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._users = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}  # key -> page
        self._empty = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in the order in which they were given back

    @property
    def num_free(self) -> int:
        """Pages that `take` could give."""
        return len(self._empty) + len(self._idle)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known beginning, which the caller now uses too."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._users[page] += 1
            found.append(page)
        return found

    def take(self, count: int) -> list[int] | None:
        """That many pages, whose content is the caller's to write; None where there are not so many."""
        if count > self.num_free:
            return None
        return [self._take_one() for _ in range(count)]

    def release(self, pages: Sequence[int]) -> None:
        """Gives up the caller's use of a text's pages, the last one first: its beginning is of use to most."""
        for page in reversed(pages):
            assert self._users[page] > 0, f"page {page} was released by somebody who did not use it"
            self._users[page] -= 1
            if self._users[page] == 0:
                if self._keys[page] is None:
                    self._empty.append(page)
                else:
                    self._idle[page] = None

    def remember(self, page: int, key: bytes) -> None:
        """From now on `find` knows a page, which is full, in use, and not written any more."""
        if key not in self._pages and self._keys[page] is None:
            self._pages[key], self._keys[page] = page, key

    def clear(self) -> None:
        """Forgets all keys: what pages hold is lost. Nobody uses a page."""
        assert not any(self._users), "the pages of a text that is being served cannot be cleared"
        self._pages.clear()
        self._keys = [None] * self.num_pages
        self._empty += self._idle
        self._idle.clear()

    def _take_one(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            key, self._keys[page] = self._keys[page], None
            assert key is not None
            del self._pages[key]
        self._users[page] = 1
        return page
