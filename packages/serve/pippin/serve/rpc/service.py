"""A service of a .proto file as gRPC's handlers and as a client's calls, from its descriptor alone."""

from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass


def service_handler(service: ServiceDescriptor, methods: Mapping[str, Any]) -> grpc.GenericRpcHandler:
    """What serves a service; `methods` has each of its methods by name.

    A method is a coroutine function of request and context, or an asynchronous generator function where it streams.
    """
    missing = {m.name for m in service.methods} ^ set(methods)
    assert not missing, f"{service.full_name} and its methods differ by {sorted(missing)}"
    handlers = {}
    for method in service.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            methods[method.name],
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def client_method(channel: grpc.Channel | grpc.aio.Channel, method: MethodDescriptor) -> Any:
    """What calls a method over a channel: a multicallable of grpc or grpc.aio, as the channel is."""
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    return make(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
