"""PolicyService over gRPC. Inferences go through as the bytes they came as; only their envelopes are read."""

import secrets

import grpc
from openpi_flash.v1 import policy_pb2
from openpi_flash_common.errors import error_to_proto
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.telemetry import Telemetry, TraceContext, current_span

from openpi_flash_gateway import wire
from openpi_flash_gateway.endpoint import Endpoint

SERVICE: str = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name

_STREAM_METHOD = "PolicyService/InferStream"


class PolicyServicer:
    """Handlers of raw bytes. `register` adds them to a server; `server` must be set before the first stream."""

    server: GrpcServer

    def __init__(self, endpoint: Endpoint, telemetry: Telemetry) -> None:
        self._endpoint = endpoint
        self._telemetry = telemetry

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the handlers to a gRPC server."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Infer": grpc.unary_unary_rpc_method_handler(self.infer),
            "InferStream": grpc.stream_stream_rpc_method_handler(self.infer_stream),
            "GetMetadata": grpc.unary_unary_rpc_method_handler(self.get_metadata),
            "Reset": grpc.unary_unary_rpc_method_handler(self.reset),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def infer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Serialized InferRequest to InferResponse."""
        trace = current_span().context
        return bytes(await self._endpoint.infer([request], timeout_s=context.time_remaining(), trace=trace))

    async def infer_stream(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """Serialized InferStreamRequests to InferStreamResponses, in order, one at a time.

        Those that name no session are in the stream's own.
        """
        trace = TraceContext.from_metadata(context.invocation_metadata())
        session_id = f"stream-{secrets.token_hex(8)}"

        async def answer(data: bytes) -> bytes:
            request_id = 0
            try:
                request = wire.read_stream_request(data)
                request_id = request.request_id
                own = TraceContext(request.traceparent, request.tracestate) if request.traceparent else trace
                limits = (request.timeout_ms / 1e3 if request.timeout_ms else None, context.time_remaining())
                timeout_s = min((limit for limit in limits if limit is not None), default=None)
                with self._telemetry.request(_STREAM_METHOD, own) as span:
                    body = await self._endpoint.infer(
                        request.body, session_id=session_id, timeout_s=timeout_s, trace=span.context
                    )
            except Exception as error:
                return wire.write_stream_response(request_id, error_to_proto(error))
            return wire.write_stream_response(request_id, body)

        try:
            await self.server.lock_step(context, answer)
        finally:
            self._endpoint.forget(session_id)

    async def get_metadata(self, _: bytes, __: grpc.aio.ServicerContext) -> bytes:
        """Serialized GetMetadataRequest to GetMetadataResponse."""
        return self._endpoint.metadata().SerializeToString()

    async def reset(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Serialized ResetRequest to ResetResponse."""
        trace = current_span().context
        return await self._endpoint.reset(request, timeout_s=context.time_remaining(), trace=trace)
