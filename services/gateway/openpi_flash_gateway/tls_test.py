"""TLS, client certificates and tokens: on both listeners, and towards the action service."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openpi_flash.v1 import policy_pb2_grpc
from openpi_flash_common.settings import AuthSettings, TlsSettings
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidMessage

from openpi_flash_gateway.conftest import FakeActionService, make_settings, running_gateway
from openpi_flash_gateway.gateway import Gateway
from openpi_flash_gateway.grpc_service_test import infer_request

CERTIFICATES = Path(__file__).parents[3] / "tests/data/tls"
SERVER = {"cert_file": str(CERTIFICATES / "server.pem"), "key_file": str(CERTIFICATES / "server.key")}
MUTUAL = {**SERVER, "client_ca_file": str(CERTIFICATES / "ca.pem")}


def read(name: str) -> bytes:
    return (CERTIFICATES / name).read_bytes()


async def ask_grpc(gateway: Gateway, credentials: grpc.ChannelCredentials | None, **call: Any) -> Any:
    address = f"127.0.0.1:{gateway.server.ports[0]}"
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        return await stub.Infer(infer_request(), **call)


async def greet_websocket(gateway: Gateway, context: ssl.SSLContext | None) -> bytes:
    scheme = "wss" if context else "ws"
    async with connect(f"{scheme}://127.0.0.1:{gateway.websocket_ports['action']}", ssl=context) as connection:
        return await asyncio.wait_for(connection.recv(), 10)


@pytest.mark.parametrize("gateway_settings", [{"tls": SERVER}])
async def test_tls_on_both_listeners(gateway):
    assert (await ask_grpc(gateway, grpc.ssl_channel_credentials(read("ca.pem")))).tensors
    context = ssl.create_default_context(cafile=CERTIFICATES / "ca.pem")
    assert await greet_websocket(gateway, context)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_grpc(gateway, None)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(ssl.SSLCertVerificationError):
        await greet_websocket(gateway, ssl.create_default_context())
    assert (await ask_grpc(gateway, grpc.ssl_channel_credentials(read("ca.pem")))).tensors


@pytest.mark.parametrize("gateway_settings", [{"tls": MUTUAL}])
async def test_client_certificates(gateway):
    ours = grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))
    assert (await ask_grpc(gateway, ours)).tensors
    context = ssl.create_default_context(cafile=CERTIFICATES / "ca.pem")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_grpc(gateway, grpc.ssl_channel_credentials(read("ca.pem")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises((OSError, InvalidMessage)):  # TLS 1.3 says so only after the handshake
        await greet_websocket(gateway, context)
    context.load_cert_chain(CERTIFICATES / "client.pem", CERTIFICATES / "client.key")
    assert await greet_websocket(gateway, context)


@pytest.mark.parametrize("gateway_settings", [{"auth": {"tokens": ["sesame", "open"]}}])
async def test_tokens_over_grpc(gateway):
    for token in ("sesame", "open"):
        assert (await ask_grpc(gateway, None, metadata=(("authorization", f"Bearer {token}"),))).tensors
    with pytest.raises(grpc.aio.AioRpcError, match="token") as caught:
        await ask_grpc(gateway, None)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_action_service_asks_for_certificate_and_token(tmp_path):
    service = FakeActionService(tls=TlsSettings(**MUTUAL), auth=AuthSettings(tokens=("sesame",)))
    await service.start()
    trusted = {
        "address": f"127.0.0.1:{service.port}",
        "ca_file": str(CERTIFICATES / "ca.pem"),
        "client_cert_file": str(CERTIFICATES / "client.pem"),
        "client_key_file": str(CERTIFICATES / "client.key"),
        "token": "sesame",
    }
    async with running_gateway(make_settings(tmp_path, action=trusted)) as gateway:
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
        assert (await ask_grpc(gateway, None)).tensors
    for missing, reason in (("ca_file", "out of reach"), ("token", "a valid bearer token is required")):
        settings = make_settings(tmp_path, action={**trusted, missing: None})
        async with running_gateway(settings) as gateway:
            while reason not in gateway.endpoint.not_ready_reason:
                await asyncio.sleep(0.02)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel:
                status = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await service.stop()
