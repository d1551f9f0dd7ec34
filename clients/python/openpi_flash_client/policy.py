"""A policy on a server, over gRPC, with the interface of openpi's policies."""

import logging
import threading
from pathlib import Path
from typing import Any

import grpc
from openpi_flash.v1 import inference_pb2

from openpi_flash_client.channel import open_channel
from openpi_flash_client.errors import PolicyError, PolicyTimeoutError, closed_error, from_rpc_error, from_status
from openpi_flash_client.pictures import prepare
from openpi_flash_client.remote import ANSWERS, Call, RemotePolicy
from openpi_flash_client.stream import Deadlines, LostError, Stream

logger = logging.getLogger(__name__)

_SERVICE = "openpi_flash.v1.PolicyService"


class GrpcPolicy(RemotePolicy):
    """A policy served by openpi-flash, over gRPC. May be used by several threads at once.

    Requests travel on long-lived streams, one at a time on each. A connection that is lost, by a restart of the server
    or a gap in the network, is made anew by itself; a request that got no answer is then sent once more, if there is
    time left.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 50051,
        *,
        unix_socket: str | Path | None = None,
        timeout_s: float = 10.0,
        connect_timeout_s: float | None = 60.0,
        ca_file: str | Path | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
        insecure_plaintext: bool = False,
        token: str | None = None,
        session_id: str | None = None,
        open_loop_horizon: int | None = None,
        prefetch_steps: int = 0,
    ) -> None:
        """Connects, and waits until the server is ready.

        The connection is TLS, verified against the system's CAs; to loopback it is plain text unless a certificate is
        given.

        Args:
            host: name or address of the gateway.
            port: its gRPC port.
            unix_socket: path of its Unix socket, in place of host and port.
            timeout_s: time that `infer` and `reset` may take unless they say otherwise.
            connect_timeout_s: time to wait for a ready server; None: for ever, as openpi's client does.
            ca_file: PEM file of the CA that signed the server's certificate, in place of the system's.
            client_cert_file: PEM file of the robot's own certificate, where the server asks for one.
            client_key_file: PEM file of that certificate's private key.
            insecure_plaintext: send everything, the token included, unencrypted to a host that is not this machine.
            token: sent with every call.
            session_id: groups what the server keeps for this robot; None: a random one.
            open_loop_horizon: `infer` gives one step of the last chunk, and asks for the next chunk after so many; then
                it is for one thread. None: $OPENPI_OPEN_LOOP_HORIZON, or else `infer` gives whole chunks.
            prefetch_steps: with an open_loop_horizon, how many steps before the last the next chunk is asked for, in
                the background; its first steps, which are over when it takes over, are left out.

        Raises:
            UnavailableError: no ready server within `connect_timeout_s`.
            AuthenticationError: the server does not accept the token.
            ValueError: options that contradict each other.
            OSError: a certificate or key cannot be read.
        """
        self._channel, address = open_channel(
            host,
            port,
            unix_socket=unix_socket,
            ca_file=ca_file,
            client_cert_file=client_cert_file,
            client_key_file=client_key_file,
            insecure_plaintext=insecure_plaintext,
        )
        super().__init__(
            address,
            timeout_s=timeout_s,
            session_id=session_id,
            open_loop_horizon=open_loop_horizon,
            prefetch_steps=prefetch_steps,
        )
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._stream_method: Any = self._channel.stream_stream(f"/{_SERVICE}/InferStream")
        self._deadlines = Deadlines()
        self._lock = threading.Lock()  # guards the three below
        self._idle: list[Stream] = []
        self._last_request_id = 0
        self._num_lost_streams = 0
        # Without its event engine, which a process can turn off, gRPC connects only while somebody waits for it.
        self._channel.subscribe(_ignore)
        try:
            self._wait_ready(connect_timeout_s)
        finally:
            self._channel.unsubscribe(_ignore)

    def _exchange(self, call: Call) -> Any:
        return self._infer(call) if call.method == "Infer" else self._ask(call)

    def _infer(self, call: Call) -> inference_pb2.InferResponse:
        if call.pictures:
            call.message.request.MergeFromString(prepare(call.pictures))
        stream = self._take()
        try:
            try:
                answer = self._ask_on(stream, call)
            except LostError as lost:
                if self._closed or not lost.retryable:
                    raise
                logger.info("no answer from %s (%s); the request is sent again", self._address, lost)
                self._count_lost()
                stream = self._open()
                answer = self._ask_on(stream, call)
        except LostError as lost:
            raise lost.error from lost
        except PolicyTimeoutError as error:
            raise PolicyTimeoutError(f"no answer from {self._address} within {call.timeout_s:g} s") from error
        with self._lock:
            self._idle.append(stream)
        if answer.HasField("error"):
            raise from_status(answer.error.code, answer.error.message, answer.error.field)
        return answer.response

    def _ask_on(self, stream: Stream, call: Call) -> inference_pb2.InferStreamResponse:
        message = call.message
        with self._lock:
            self._last_request_id += 1
            message.request_id = self._last_request_id
        message.timeout_ms = max(1, round(call.time_left_s * 1e3))
        data = stream.exchange(message.SerializeToString(), call.deadline, self._deadlines)
        answer = inference_pb2.InferStreamResponse.FromString(data)
        if answer.request_id != message.request_id:  # never hand over another moment's actions
            stream.close()
            raise PolicyError(f"the server answered request {answer.request_id} in place of {message.request_id}")
        return answer

    def _ask(self, call: Call) -> Any:
        try:
            method: Any = self._channel.unary_unary(f"/{_SERVICE}/{call.method}")
            answer = method(call.message.SerializeToString(), timeout=call.time_left_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return ANSWERS[call.method].FromString(answer)

    def _take(self) -> Stream:
        while True:
            with self._lock:
                stream = self._idle.pop() if self._idle else None
            if stream is None:
                return self._open()
            if not stream.over:
                return stream
            self._count_lost()

    def _open(self) -> Stream:
        if self._closed:
            raise closed_error()
        return Stream(self._stream_method, self._metadata)

    def _count_lost(self) -> None:
        with self._lock:
            self._num_lost_streams += 1

    @property
    def _num_lost(self) -> int:
        return self._num_lost_streams

    def _disconnect(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()
        self._channel.close()
        self._deadlines.close()


def _ignore(_: grpc.ChannelConnectivity) -> None:
    """Has a channel watched by whom nothing of it interests."""
