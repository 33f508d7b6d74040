"""Who may call what.

A file names the callers, one a line: `SECRET ROLE TENANT`, where SECRET is a bearer token, the SHA-256 of one as
`sha256:HEX`, or `x509:NAME` for the common name or a DNS name of a client's certificate, and ROLE is `inference`,
`admin`, `metrics`, or several of them, with commas between. Empty lines and lines that begin with `#` say nothing.
"""

import dataclasses
import hashlib
import hmac
import pathlib
import re
from collections.abc import Callable, Sequence

from pippin.core.errors import ConfigError
from pippin.serve.watched_file import WatchedFiles

ROLES = frozenset({"inference", "admin", "metrics"})  # of these, metrics opens only what any role does
_SCHEME = "bearer "
_MIN_TOKEN_LENGTH = 16
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Caller:
    """Somebody who may call."""

    tenant: str  # whose fair share and cached prefixes are used
    roles: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Callers:
    """Those that the file names."""

    tokens: Sequence[tuple[bytes, Caller]] = ()  # SHA-256 of a token, whose it is
    names: Sequence[tuple[str, Caller]] = ()  # of certificates

    def with_token(self, token: bytes) -> Caller | None:
        """Whose a token is. Takes as long for a token that is nearly right as for any other."""
        digest, found = hashlib.sha256(token).digest(), None
        for known, caller in self.tokens:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def with_name(self, names: Sequence[str]) -> Caller | None:
        """Whose a certificate is."""
        return next((caller for name, caller in self.names if name in names), None)


def read_callers(path: pathlib.Path) -> Callers:
    """The callers that a file names.

    Raises:
        ConfigError: a line is wrong, or there is none. No secret is in its text.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}. Give a file of tokens.") from None
    tokens: list[tuple[bytes, Caller]] = []
    names: list[tuple[str, Caller]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        roles = frozenset(words[1].split(",")) if len(words) == 3 else frozenset()
        if not roles or not roles <= ROLES:
            raise ConfigError(
                f"{path}, line {number}: must be `SECRET ROLE TENANT`, where ROLE is one or more of inference, admin and metrics, with commas between."
            )
        secret, caller = words[0], Caller(words[2], roles)
        if secret.startswith("x509:"):
            names.append((secret.removeprefix("x509:"), caller))
        else:
            tokens.append((_digest(secret, f"{path}, line {number}"), caller))
    if not tokens and not names:
        raise ConfigError(f"{path} names no caller. Write a line `SECRET ROLE TENANT`.")
    return Callers(tokens, names)


class Identities:
    """Says who somebody is by what they show, in any protocol.

    With neither a file nor certificates everybody may do all: only for this machine (see `server`).
    """

    def __init__(self, callers: WatchedFiles[Callers] | None, *, certificates: bool = False):
        """`certificates`: clients have one, whose authority was checked; a name that the file has not may infer."""
        self._callers, self._certificates = callers, certificates

    @property
    def asks(self) -> bool:
        """Not everybody is let in."""
        return self._callers is not None or self._certificates

    def find(self, authorization: bytes | None, names: Callable[[], Sequence[str]]) -> Caller | None:
        """Who shows an `authorization` header, or a certificate with these names; None: nobody known."""
        if not self.asks:
            return Caller("", ROLES)
        callers = self._callers.value if self._callers is not None else Callers()
        if authorization is not None:
            return callers.with_token(_bearer_token(authorization))
        if not self._certificates:
            return None
        shown = names()
        return callers.with_name(shown) or (Caller(shown[0], frozenset({"inference"})) if shown else None)


def identities(tokens: pathlib.Path | None, *, certificates: bool) -> Identities:
    """Of the callers that a file names, read anew after it changed.

    Raises:
        ConfigError: the file is wrong.
    """
    callers = None if tokens is None else WatchedFiles([tokens], lambda paths: read_callers(paths[0]))
    return Identities(callers, certificates=certificates)


def _digest(secret: str, where: str) -> bytes:
    if secret.startswith("sha256:"):
        digits = secret.removeprefix("sha256:").lower()
        if not _HEX.fullmatch(digits):
            raise ConfigError(f"{where}: sha256: must be followed by 64 hexadecimal digits.")
        return bytes.fromhex(digits)
    if len(secret) < _MIN_TOKEN_LENGTH:
        raise ConfigError(
            f"{where}: a token of {len(secret)} letters can be guessed; it must have {_MIN_TOKEN_LENGTH} or more."
        )
    return hashlib.sha256(secret.encode()).digest()


def _bearer_token(authorization: bytes) -> bytes:
    scheme = authorization[: len(_SCHEME)].decode("latin-1").lower()
    return authorization[len(_SCHEME) :].strip() if scheme == _SCHEME else b""
