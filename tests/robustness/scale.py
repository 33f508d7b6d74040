"""How hard the tests try: as hard as a few minutes allow, or, with PIPPIN_LONG=1, for as long as it takes."""

import os

LONG = os.environ.get("PIPPIN_LONG") == "1"


def scaled(short: int, long: int) -> int:
    """The one or the other."""
    return long if LONG else short
