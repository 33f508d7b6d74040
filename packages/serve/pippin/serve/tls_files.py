"""The files of the server's certificate and of its clients' authorities."""

import dataclasses
import pathlib
import ssl
from collections.abc import Sequence

from pippin.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files."""

    certificate: pathlib.Path  # the server's, with those between it and its authority
    key: pathlib.Path
    client_ca: pathlib.Path | None = None  # clients must have a certificate of one of these authorities

    @property
    def paths(self) -> list[pathlib.Path]:
        """Of all that there are, in this order."""
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]


def read_context(paths: Sequence[pathlib.Path]) -> ssl.SSLContext:
    """What serves the certificate of `TlsFiles.paths`, and asks for those of clients where there is an authority.

    Raises:
        ConfigError: a file is missing, or is not what it should be, or key and certificate are not a pair.
    """
    certificate, key, *client_ca = paths
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file. Give a PEM file.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
        if client_ca:
            context.load_verify_locations(client_ca[0])
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{', '.join(map(str, paths))} are not a certificate, its key, and authorities, each as PEM: "
            f"{_reason(error)}. Give files that belong together."
        ) from None
    return context


def _reason(error: OSError) -> str:
    told = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return told or "there is none in a file"
