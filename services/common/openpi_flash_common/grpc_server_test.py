"""What the shared server promises: health, errors, limits, TLS, tokens, and a stop that loses nothing."""

import asyncio
import contextlib
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openpi_flash.v1 import action_pb2, action_pb2_grpc, inference_pb2

from openpi_flash_common import grpc_server
from openpi_flash_common.errors import (
    InternalError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
    from_rpc_error,
)
from openpi_flash_common.grpc_server import LIVENESS, GrpcServer
from openpi_flash_common.settings import AuthSettings, SettingsError, TlsSettings
from openpi_flash_common.telemetry import Telemetry

SERVICE = action_pb2.DESCRIPTOR.services_by_name["ActionService"].full_name
TLS_DATA = Path(__file__).parents[3] / "tests/data/tls"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Servicer(action_pb2_grpc.ActionServiceServicer):
    """Sessions with a meaning: `bad` and `broken` fail, `slow` waits for `release`."""

    def __init__(self) -> None:
        self.server: GrpcServer
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Reset(self, request, context):
        await self._work(request.session_id)
        return inference_pb2.ResetResponse()

    async def InferStream(self, requests, context):
        async def answer(request):
            await self._work(request.request.session_id)
            return inference_pb2.InferStreamResponse(request_id=request.request_id)

        await self.server.lock_step(context, answer)

    async def _work(self, session_id: str) -> None:
        self.started.set()
        if session_id == "bad":
            raise InvalidArgumentError("session_id: é is not wanted", "session_id")
        if session_id == "broken":
            raise RuntimeError("the secret of the house")
        if session_id == "slow":
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise


@contextlib.asynccontextmanager
async def serving(**options) -> AsyncIterator[tuple[Servicer, str]]:
    """A running server and its address."""
    servicer = Servicer()
    register = {SERVICE: lambda server: action_pb2_grpc.add_ActionServiceServicer_to_server(servicer, server)}
    server = servicer.server = GrpcServer(register, ["127.0.0.1:0"], Telemetry(), **options)
    await server.start()
    running = asyncio.ensure_future(server.run_until_stopped())
    try:
        yield servicer, f"127.0.0.1:{server.ports[0]}"
    finally:
        servicer.release.set()
        server.stop()
        await running


@contextlib.asynccontextmanager
async def connected(**options) -> AsyncIterator[tuple[Servicer, grpc.aio.Channel]]:
    async with serving(**options) as (servicer, address), grpc.aio.insecure_channel(address) as channel:
        yield servicer, channel


async def reset(channel: grpc.aio.Channel, session_id: str = "", **options) -> None:
    stub = action_pb2_grpc.ActionServiceStub(channel)
    await stub.Reset(inference_pb2.ResetRequest(session_id=session_id), **{"timeout": 10, **options})


def stream_request(request_id: int, session_id: str = "") -> inference_pb2.InferStreamRequest:
    request = inference_pb2.InferRequest(session_id=session_id)
    return inference_pb2.InferStreamRequest(request_id=request_id, request=request)


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)).status


async def test_health_is_not_serving_until_told():
    async with connected() as (servicer, channel):
        assert [await health_of(channel, name) for name in ("", SERVICE)] == [NOT_SERVING] * 2
        await servicer.server.set_serving(True)
        assert [await health_of(channel, name) for name in ("", SERVICE)] == [SERVING] * 2
        await servicer.server.set_serving(False)
        assert await health_of(channel, SERVICE) == NOT_SERVING
        assert await health_of(channel, LIVENESS) == SERVING, "a process that answers is alive"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(channel, "unknown.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_and_describes_the_services():
    async with connected() as (_, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests), timeout=10)]
        names = {service.name for service in answers[0].list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        assert b"ActionService" in answers[1].file_descriptor_response.file_descriptor_proto[0]


async def test_typed_errors_become_statuses_with_their_field():
    async with connected() as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(channel, "bad")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidArgumentError)
        assert (error.message, error.field) == ("session_id: é is not wanted", "session_id")


async def test_other_exceptions_tell_the_client_nothing_and_the_log_everything(caplog):
    async with connected() as (_, channel):
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(channel, "broken")
        error = from_rpc_error(caught.value)
        assert isinstance(error, InternalError)
        assert "secret" not in error.message
        reference = error.message.split("reference ")[1].split(" ")[0]
        logged = next(record for record in caplog.records if reference in record.getMessage())
        assert "the secret of the house" in str(logged.exc_info)
        await reset(channel)


async def test_a_stream_is_answered_in_order_and_a_failed_handler_ends_it_with_a_status():
    async with connected() as (_, channel):
        call = action_pb2_grpc.ActionServiceStub(channel).InferStream(timeout=10)
        for number in (1, 2, 3):
            await call.write(stream_request(number))
        assert [(await call.read()).request_id for _ in range(3)] == [1, 2, 3]
        await call.write(stream_request(4, "bad"))
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await call.read()


async def test_a_client_that_ends_its_stream_gets_its_answers_first():
    async with connected() as (_, channel):
        call = action_pb2_grpc.ActionServiceStub(channel).InferStream(iter([stream_request(1)]), timeout=10)
        assert [answer.request_id async for answer in call] == [1]
        assert await call.code() is grpc.StatusCode.OK


async def test_cancelling_a_call_cancels_its_handler():
    async with connected() as (servicer, channel):
        call = action_pb2_grpc.ActionServiceStub(channel).InferStream()
        await call.write(stream_request(1, "slow"))
        await asyncio.wait_for(servicer.started.wait(), 10)
        call.cancel()
        await asyncio.wait_for(servicer.cancelled.wait(), 10)


async def test_oversized_messages_are_refused_and_the_server_goes_on():
    async with connected(max_message_bytes=100_000) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(channel, "x" * 100_001)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "100000" in caught.value.details()
        await reset(channel, "x" * 99_000)


async def test_a_token_is_asked_for_everywhere_but_in_health():
    async with connected(auth=AuthSettings(tokens=("first", "second"))) as (_, channel):
        assert await health_of(channel, "") == NOT_SERVING
        for metadata in ((), (("authorization", "Bearer third"),), (("authorization", "first"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await reset(channel, metadata=metadata)
            assert isinstance(from_rpc_error(caught.value), UnauthenticatedError)
            call = action_pb2_grpc.ActionServiceStub(channel).InferStream(iter([stream_request(1)]), metadata=metadata)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        reflection_call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert await reflection_call.code() is grpc.StatusCode.UNAUTHENTICATED
        for token in ("first", "second"):
            await reset(channel, metadata=(("authorization", f"Bearer {token}"),))
            call = action_pb2_grpc.ActionServiceStub(channel).InferStream(
                iter([stream_request(1)]), metadata=(("authorization", f"Bearer {token}"),)
            )
            assert [answer.request_id async for answer in call] == [1]


def channel_credentials(ca: str = "ca.pem", client: str | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        (TLS_DATA / ca).read_bytes(),
        (TLS_DATA / f"{client}.key").read_bytes() if client else None,
        (TLS_DATA / f"{client}.pem").read_bytes() if client else None,
    )


def tls_settings(**options) -> TlsSettings:
    return TlsSettings(cert_file=TLS_DATA / "server.pem", key_file=TLS_DATA / "server.key", **options)


async def test_tls_is_for_those_who_verify():
    async with serving(tls=tls_settings()) as (_, address):
        async with grpc.aio.secure_channel(address, channel_credentials()) as channel:
            await reset(channel)
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await reset(channel)
        # A certificate that this client's CA did not sign.
        async with grpc.aio.secure_channel(address, channel_credentials(ca="client.pem")) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await reset(channel)


async def test_mtls_asks_clients_for_a_certificate():
    async with serving(tls=tls_settings(client_ca_file=TLS_DATA / "ca.pem")) as (_, address):
        async with grpc.aio.secure_channel(address, channel_credentials(client="client")) as channel:
            await reset(channel)
        async with grpc.aio.secure_channel(address, channel_credentials()) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await reset(channel)


async def test_what_cannot_listen_says_why(tmp_path):
    async with serving() as (_, address):
        with pytest.raises(SettingsError, match=f"cannot listen on {address}"):
            await GrpcServer({}, [address], Telemetry()).start()
    tls = TlsSettings(cert_file=tmp_path / "absent.pem", key_file=TLS_DATA / "server.key")
    with pytest.raises(SettingsError, match=r"tls\.cert_file: .*absent\.pem: No such file"):
        await GrpcServer({}, ["127.0.0.1:0"], Telemetry(), tls=tls).start()


async def test_a_unix_socket_is_for_its_owner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket may not be long
    server = GrpcServer({}, ["unix:s"], Telemetry(), tls=tls_settings())
    await server.start()
    running = asyncio.ensure_future(server.run_until_stopped())
    assert stat.S_IMODE(os.stat("s").st_mode) == 0o600  # noqa: PTH116
    async with grpc.aio.insecure_channel("unix:s") as channel:
        assert await health_of(channel, "") == NOT_SERVING
    server.stop()
    await running


async def test_a_stop_finishes_what_runs_and_ends_what_is_idle():
    async with connected() as (servicer, channel):
        stub = action_pb2_grpc.ActionServiceStub(channel)
        await servicer.server.set_serving(True)
        statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await statuses.read()).status == SERVING

        idle = stub.InferStream()
        await idle.write(stream_request(1))
        assert (await idle.read()).request_id == 1
        servicer.started.clear()
        busy = stub.InferStream()
        await busy.write(stream_request(2, "slow"))
        await asyncio.wait_for(servicer.started.wait(), 10)
        servicer.started.clear()
        unary = asyncio.ensure_future(reset(channel, "slow"))
        await asyncio.wait_for(servicer.started.wait(), 10)

        servicer.server.stop()
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await idle.read()
        assert (await statuses.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reset(channel)
        assert isinstance(from_rpc_error(caught.value), UnavailableError)
        assert not unary.done()

        servicer.release.set()
        await unary
        assert (await busy.read()).request_id == 2
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await busy.read()


async def test_a_stop_does_not_wait_for_a_grpc_that_never_says_that_it_stopped(monkeypatch, caplog):
    monkeypatch.setattr(grpc_server, "_CUT_OFF_TIMEOUT_S", 0.01)
    server = GrpcServer({}, ["127.0.0.1:0"], Telemetry())
    await server.start()
    stop = server._server.stop
    monkeypatch.setattr(server._server, "stop", lambda grace: asyncio.get_running_loop().create_future())
    server.stop()
    await asyncio.wait_for(server.run_until_stopped(), 10)
    assert "gRPC does not end" in caplog.text
    await stop(None)


async def test_a_stop_does_not_wait_forever():
    async with connected(drain_seconds=0.1) as (servicer, channel):
        call = action_pb2_grpc.ActionServiceStub(channel).InferStream()
        await call.write(stream_request(1, "slow"))
        await asyncio.wait_for(servicer.started.wait(), 10)
        servicer.server.stop()
        assert await asyncio.wait_for(call.code(), 10) is not grpc.StatusCode.OK
        await asyncio.wait_for(servicer.cancelled.wait(), 10)


PROGRAM = """
import asyncio
from openpi_flash_common import grpc_server_test as t

async def main():
    async with t.serving() as (servicer, address):
        print(address, flush=True)
        await servicer.server.wait_stopping()
        if {stubborn}:
            await asyncio.sleep(600)
        servicer.release.set()
    print("clean", flush=True)

asyncio.run(main())
"""


def start_program(*, stubborn: bool) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(stubborn=stubborn)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_finishes_what_runs_and_exits_with_zero(number):
    process, address = start_program(stubborn=False)
    async with grpc.aio.insecure_channel(address) as channel:
        call = action_pb2_grpc.ActionServiceStub(channel).InferStream()
        await call.write(stream_request(1))
        assert (await call.read()).request_id == 1
        await call.write(stream_request(2, "slow"))
        # A unary call that has been answered shows that the stream's request, which was sent before, has arrived.
        await reset(channel)
        process.send_signal(number)
        assert (await call.read()).request_id == 2
    output, _ = await asyncio.to_thread(process.communicate, timeout=20)
    assert (output.strip(), process.returncode) == ("clean", 0)


async def test_a_second_signal_exits_at_once():
    process, address = start_program(stubborn=True)
    async with grpc.aio.insecure_channel(address) as channel:
        await reset(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        process.send_signal(signal.SIGTERM)
        await watch.code()  # cut off: the first signal has been seen
        process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 20) == 128 + signal.SIGTERM
