"""The body of a request: JSON whose size and nesting are bounded before it is parsed."""

import asyncio
import itertools
import json
import math
import re
from typing import Any, NoReturn

from starlette.requests import Request

from pippin.serve.http.http_limits import HttpLimits
from pippin.serve.http.problem import Problem, TooLargeProblem

# Parsing more than this is a thread's, so that other streams go on meanwhile.
_SMALL_BYTES = 64 << 10
# So many times the limit is read and forgotten: a client that still sends would not see why it is refused.
_DISCARDED = 4
# A string, also one without an end: each byte is looked at once.
_STRING = re.compile(rb'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def read_object(request: Request, limits: HttpLimits) -> dict[str, Any]:
    """The JSON object that is the body.

    Raises:
        Problem: the body is none, too large, too deep, or too slow to come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another site can send any other type without asking first.
    if kind != "application/json":
        raise Problem(415, "The body must be JSON. Send it with `Content-Type: application/json`.")
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            data = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        raise Problem(
            408, f"The body did not come within {limits.body_timeout_s:g} s.", headers={"connection": "close"}
        ) from None
    if len(data) <= _SMALL_BYTES:
        return parse_object(data, limits.max_depth)
    return await asyncio.to_thread(parse_object, data, limits.max_depth)


def parse_object(data: bytes, max_depth: int) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Problem: it is none.
    """
    try:
        text = data.decode()  # JSON's parser would also take UTF-16, whose brackets are others
    except UnicodeDecodeError:
        raise Problem(400, "The body is not JSON: it is no UTF-8 text.") from None
    brackets = _STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    if max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0) > max_depth:
        raise Problem(400, f"The body is nested deeper than {max_depth} levels. Send it flatter.")
    try:
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except ValueError as error:
        where = f" (character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise Problem(400, f"The body is not JSON{where}. NaN and Infinity are none, too.") from None
    if not isinstance(found, dict):
        raise Problem(400, "The body must be a JSON object.")
    return found


async def _read(request: Request, most: int) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > _DISCARDED * most:
        raise TooLargeProblem(most)
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            data += chunk
        elif size > _DISCARDED * most:
            break
    if size > most:
        raise TooLargeProblem(most)
    return bytes(data)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number
