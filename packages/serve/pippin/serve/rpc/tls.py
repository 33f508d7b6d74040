"""Certificates of the server and of its clients."""

import dataclasses
import logging
import pathlib
import ssl
from typing import Any

import grpc

from pippin.core.errors import ConfigError
from pippin.serve.rpc.watched_file import WatchedFiles

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files."""

    certificate: pathlib.Path  # the server's, with those between it and its authority
    key: pathlib.Path
    client_ca: pathlib.Path | None = None  # clients must have a certificate of one of these authorities


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What a port needs. Connections made after the files changed get the new certificate.

    Raises:
        ConfigError: a file is missing, or is not what it should be, or key and certificate are not a pair.
    """
    paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
    watched = WatchedFiles(paths, _read)
    given = watched.value

    def newest() -> Any:  # the stubs do not know of None
        """None: what was given last is still right. gRPC asks at each connection."""
        nonlocal given
        if watched.value is given:
            return None
        given = watched.value
        return given

    return grpc.dynamic_ssl_server_credentials(
        given, newest, require_client_authentication=files.client_ca is not None
    )


def _read(paths: list[pathlib.Path]) -> grpc.ServerCertificateConfiguration:
    certificate, key, *client_ca = paths
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file. Give a PEM file.")
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        check.load_cert_chain(certificate, key, password=lambda: "")
        if client_ca:
            check.load_verify_locations(client_ca[0])
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{', '.join(map(str, paths))} are not a certificate, its key, and authorities, each as PEM: "
            f"{error.reason if isinstance(error, ssl.SSLError) else error.strerror}. Give files that belong together."
        ) from None
    pair = (key.read_bytes(), certificate.read_bytes())
    authorities = client_ca[0].read_bytes() if client_ca else None
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)
