"""Certificates of the gRPC server and of its clients."""

import pathlib
from typing import Any

import grpc

from pippin.serve.tls_files import TlsFiles, read_context
from pippin.serve.watched_file import WatchedFiles


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What a port needs. Connections made after the files changed get the new certificate.

    Raises:
        ConfigError: a file is missing, or is not what it should be, or key and certificate are not a pair.
    """
    watched = WatchedFiles(files.paths, _read)
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
    read_context(paths)
    pair = (key.read_bytes(), certificate.read_bytes())
    authorities = client_ca[0].read_bytes() if client_ca else None
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)
