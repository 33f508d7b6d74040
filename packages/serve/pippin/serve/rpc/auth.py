"""Who may call which method of gRPC."""

import grpc.aio
from google.rpc import code_pb2

from pippin.serve.callers import Caller, Identities

# A service -> the role that its callers need; of others, health and reflection, any role will do.
_SERVICE_ROLE = {"pippin.v1.Inference": "inference", "pippin.v1.Admin": "admin"}


class DeniedError(Exception):
    """Somebody who may not call; the text is for them."""

    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.code, self.reason = code, reason


class Authenticator:
    """Says who makes a call, or that they may not."""

    def __init__(self, identities: Identities):
        self._identities = identities

    def authenticate(self, method: str, context: grpc.aio.ServicerContext) -> Caller:
        """Who makes a call of a method, such as /pippin.v1.Inference/Generate.

        Raises:
            DeniedError: nobody known, or without the role of its service.
        """
        caller = self._identities.find(_authorization(context), lambda: _certificate_names(context))
        if caller is None:
            raise DeniedError(
                code_pb2.UNAUTHENTICATED,
                "UNAUTHENTICATED",
                "No token that is known. Send `authorization: Bearer TOKEN` as metadata.",
            )
        role = _SERVICE_ROLE.get(method.split("/")[1])
        if role is not None and role not in caller.roles:
            raise DeniedError(
                code_pb2.PERMISSION_DENIED,
                "ROLE",
                f"This method needs the role {role}, which you do not have.",
            )
        return caller


def _authorization(context: grpc.aio.ServicerContext) -> bytes | None:
    for key, value in context.invocation_metadata() or ():
        if key.lower() == "authorization":
            return value.encode() if isinstance(value, str) else value
    return None


def _certificate_names(context: grpc.aio.ServicerContext) -> list[str]:
    """The names in the certificate of the other side: its common name, then the others."""
    found = context.auth_context()
    keys = ("x509_common_name", "x509_subject_alternative_name")
    return [name.decode() for key in keys for name in found.get(key, ())]
