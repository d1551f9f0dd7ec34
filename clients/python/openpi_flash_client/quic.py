"""A policy on a server, over QUIC, with the interface of openpi's policies."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpi_flash_client.errors import PolicyError, closed_error, from_status
from openpi_flash_client.remote import ANSWERS, Call, RemotePolicy, with_options

try:
    from openpi_flash_transport import Client, TransportError
except ImportError as error:
    raise ImportError(
        "FlashTransportPolicy needs the package openpi-flash-transport: install openpi-flash-client[quic], or from a "
        "checkout `pip install ./flash-transport/crates/python`"
    ) from error


class FlashTransportPolicy(RemotePolicy):
    """A policy served by openpi-flash, over QUIC. May be used by several threads at once, and by an event loop.

    Each request has a stream of its own, so none waits for another. The connection is kept by a thread of its own, and
    made anew by itself after a restart of the server, a change of address or a gap in the network; a request that got
    no answer is then sent once more, if there is time left. Pictures are scaled and coded as the server asks, several
    at a time and without the interpreter's lock.
    """

    def __init__(
        self,
        host: str,
        port: int = 5555,
        *,
        timeout_s: float = 10.0,
        connect_timeout_s: float | None = 60.0,
        ca_file: str | Path | None = None,
        fingerprint: str | None = None,
        insecure_skip_verify: bool = False,
        server_name: str | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
        token: str | None = None,
        session_id: str | None = None,
        open_loop_horizon: int | None = None,
        prefetch_steps: int = 0,
    ) -> None:
        """Connects, and waits until the server is ready.

        The server's certificate is verified against the system's CAs, unless one of the next three says otherwise.

        Args:
            host: name or address of the server.
            port: its UDP port.
            timeout_s: time that `infer` and `reset` may take unless they say otherwise.
            connect_timeout_s: time to wait for a ready server; None: for ever, as openpi's client does.
            ca_file: PEM file of the CA that signed the server's certificate, in place of the system's.
            fingerprint: SHA-256 of the server's certificate in hexadecimal digits, as the server logs it at its start;
                then its name and dates do not count.
            insecure_skip_verify: trust any certificate: whoever is on the way can read and change everything.
            server_name: name that the server's certificate must have; None: `host`.
            client_cert_file: PEM file of the robot's own certificate, where the server asks for one.
            client_key_file: PEM file of that certificate's private key.
            token: shown to the server with the connection.
            session_id: groups what the server keeps for this robot; None: a random one.
            open_loop_horizon: `infer` gives one step of the last chunk, and asks for the next chunk after so many; then
                it is for one thread or one task. None: $OPENPI_OPEN_LOOP_HORIZON, or else `infer` gives whole chunks.
            prefetch_steps: with an open_loop_horizon, how many steps before the last the next chunk is asked for, in
                the background; its first steps, which are over when it takes over, are left out.

        Raises:
            UnavailableError: no ready server within `connect_timeout_s`.
            AuthenticationError: the server's certificate is not trusted, or it does not accept the token or ours.
            ValueError: options that contradict each other, or a file that holds something else.
            OSError: a certificate or key cannot be read.
        """
        for path in (ca_file, client_cert_file, client_key_file):
            if path is not None:
                Path(path).open("rb").close()
        super().__init__(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            timeout_s=timeout_s,
            session_id=session_id,
            open_loop_horizon=open_loop_horizon,
            prefetch_steps=prefetch_steps,
        )
        self._client = Client(
            host,
            port,
            ca_file=ca_file,
            fingerprint=fingerprint,
            insecure_skip_verify=insecure_skip_verify,
            server_name=server_name,
            client_cert_file=client_cert_file,
            client_key_file=client_key_file,
            token=token,
        )
        self._wait_ready(connect_timeout_s)

    async def infer_async(
        self,
        obs: Mapping[str, Any],
        *,
        seed: int | None = None,
        noise: Any = None,
        num_steps: int | None = None,
        mode: str | None = None,
        timeout_s: float | None = None,
        traceparent: str = "",
    ) -> dict[str, Any]:
        """`infer` for an event loop: no thread waits for the answer. Cancelled, the server drops the work.

        With an open_loop_horizon a policy serves either `infer` or `infer_async`.
        """
        obs = with_options(obs, seed=seed, noise=noise, num_steps=num_steps, mode=mode)
        limit_s = self._timeout_s if timeout_s is None else timeout_s

        async def ask(obs: Mapping[str, Any], deadline: float) -> dict[str, Any]:
            return await self._infer_chunk(obs, self._exchange_async, limit_s, deadline, traceparent)

        if self._chunks is None:
            return await ask(obs, time.monotonic() + limit_s)
        return await self._chunks.infer_async(obs, ask, limit_s)

    def _exchange(self, call: Call) -> Any:
        try:
            answer = self._client.call(*_arguments(call), **_options(call))
        except TransportError as error:
            raise self._error(call, error) from error
        return ANSWERS[call.method].FromString(answer)

    async def _exchange_async(self, call: Call) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()

        def done(data: bytes | None, error: Exception | None) -> None:
            loop.call_soon_threadsafe(_settle, answer, data, error)

        try:
            begun = self._client.start(*_arguments(call), done, **_options(call))
            try:
                data = await answer
            except asyncio.CancelledError:
                begun.cancel()
                raise
        except TransportError as error:
            raise self._error(call, error) from error
        return ANSWERS[call.method].FromString(data)

    def _error(self, call: Call, error: TransportError) -> PolicyError:
        if self._closed:
            return closed_error()
        code, message, field = error.args
        if not message:
            connection = "" if self._client.connected else "; there is no connection"
            message = f"no answer from {self._address} within {call.timeout_s:g} s{connection}"
        return from_status(code, message, field)

    @property
    def _num_lost(self) -> int:
        return self._client.num_lost

    def _disconnect(self) -> None:
        self._client.close()


def _arguments(call: Call) -> tuple[Any, bytes, Any]:
    message = call.message.request if call.method == "Infer" else call.message
    return call.method, message.SerializeToString(), call.pictures


def _options(call: Call) -> dict[str, Any]:
    traceparent = call.message.traceparent if call.method == "Infer" else ""
    return {"timeout_s": call.time_left_s, "traceparent": traceparent}


def _settle(answer: "asyncio.Future[bytes]", data: bytes | None, error: Exception | None) -> None:
    if answer.done():  # cancelled
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(data or b"")
