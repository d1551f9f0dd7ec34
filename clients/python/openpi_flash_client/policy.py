"""A policy on a server, with the interface of openpi's policies."""

import functools
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from openpi_flash.v1 import inference_pb2

from openpi_flash_client.channel import open_channel
from openpi_flash_client.chunks import ActionChunks, default_horizon
from openpi_flash_client.codec import read_metadata, read_response, write_request
from openpi_flash_client.errors import PolicyError, PolicyTimeoutError, UnavailableError, from_rpc_error, from_status
from openpi_flash_client.stream import Deadlines, LostError, Stream

logger = logging.getLogger(__name__)

_SERVICE = "openpi_flash.v1.PolicyService"
_RETRY_DELAYS_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_PROBE_TIMEOUT_S = 5.0


class GrpcPolicy:
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
        horizon = default_horizon() if open_loop_horizon is None else open_loop_horizon
        self._chunks = None if horizon is None else ActionChunks(horizon, prefetch=prefetch_steps)
        self.session_id = uuid.uuid4().hex if session_id is None else session_id
        self._timeout_s = timeout_s
        self._channel, self._address = open_channel(
            host,
            port,
            unix_socket=unix_socket,
            ca_file=ca_file,
            client_cert_file=client_cert_file,
            client_key_file=client_key_file,
            insecure_plaintext=insecure_plaintext,
        )
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._stream_method: Any = self._channel.stream_stream(f"/{_SERVICE}/InferStream")
        self._deadlines = Deadlines()
        self._lock = threading.Lock()  # guards the two below
        self._idle: list[Stream] = []
        self._last_request_id = 0
        self._closed = False
        try:
            self._wait_ready(connect_timeout_s)
        except BaseException:
            self.close()
            raise

    def infer(
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
        """Asks for an action chunk.

        Args:
            obs: openpi's observation dictionary: arrays and numbers, nested or with `/` in their names, and `prompt`.
                It may also hold the options `seed`, `noise`, `num_steps` and `mode`; those given here go before.
            seed: of the starting noise: the same seed and observation give the same actions. None: fresh noise.
            noise: the starting noise itself, (action_horizon, action_dim), in place of a seed.
            num_steps: flow steps, 1 to 100; None: the server's default.
            mode: `default`, `action_only` or `subtask_only`; None: `default`.
            timeout_s: time this call may take, a new connection included; None: the policy's own.
            traceparent: W3C trace context of the caller.

        Returns:
            `actions`: (action_horizon, robot's action dims) float64, or with an open_loop_horizon one row of it;
            `policy_timing` and `server_timing` as openpi has them (`infer_ms`); `timing`: all of the server's times, in
            ms (`queue_ms`, `preprocess_ms`, `model_ms`, `postprocess_ms`, `planner_ms`, `total_ms`) and `batch_size`;
            where a planner took part `subtask`: `text`, `ms`, `status` (`fresh`, `reused`, `failed` or `pending`),
            `error` and `age_ms`.

        Raises:
            PolicyTimeoutError: no answer in time.
            InvalidArgumentError: an entry cannot be used; the error names it.
            PolicyError: any other failure; see its subclasses.
        """
        given = {"seed": seed, "noise": noise, "num_steps": num_steps, "mode": mode}
        obs = {**obs, **{name: value for name, value in given.items() if value is not None}}
        ask = functools.partial(self._infer_chunk, timeout_s=timeout_s, traceparent=traceparent)
        return ask(obs) if self._chunks is None else self._chunks.infer(obs, ask)

    def _infer_chunk(self, obs: Mapping[str, Any], timeout_s: float | None, traceparent: str) -> dict[str, Any]:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        message = inference_pb2.InferStreamRequest(traceparent=traceparent)
        message.request.session_id = self.session_id
        write_request(message.request, obs)
        stream = self._take()
        try:
            try:
                answer = self._exchange(stream, message, deadline)
            except LostError as lost:
                if self._closed or not lost.retryable:
                    raise
                logger.info("no answer from %s (%s); the request is sent again", self._address, lost)
                stream = self._open()
                answer = self._exchange(stream, message, deadline)
        except LostError as lost:
            raise lost.error from lost
        except PolicyTimeoutError as error:
            raise PolicyTimeoutError(f"no answer from {self._address} within {timeout_s:g} s") from error
        with self._lock:
            self._idle.append(stream)
        if answer.HasField("error"):
            raise from_status(answer.error.code, answer.error.message, answer.error.field)
        return read_response(answer.response)

    def reset(self) -> None:
        """Makes the server forget this robot's session, and drops the chunk whose steps are being served.

        Raises:
            PolicyError: the server did not do so.
        """
        if self._chunks is not None:
            self._chunks.reset()
        request = inference_pb2.ResetRequest(session_id=self.session_id)
        self._call("Reset", request.SerializeToString(), self._timeout_s)

    def get_server_metadata(self) -> dict[str, Any]:
        """What openpi's own server would tell (e.g. `reset_pose`) and, beside it, what this one serves and expects:
        `model_config_name`, `backend`, `action_horizon`, `image_specs`, `tensor_specs` and so on, as in
        GetMetadataResponse.

        Raises:
            PolicyError: the server did not answer.
        """
        answer = self._call("GetMetadata", b"", self._timeout_s)
        return read_metadata(inference_pb2.GetMetadataResponse.FromString(answer))

    def close(self) -> None:
        """Ends the connection, and with it requests in flight."""
        self._closed = True
        if self._chunks is not None:
            self._chunks.close()
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()
        self._channel.close()
        self._deadlines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(
        self, stream: Stream, message: inference_pb2.InferStreamRequest, deadline: float
    ) -> inference_pb2.InferStreamResponse:
        with self._lock:
            self._last_request_id += 1
            message.request_id = self._last_request_id
        message.timeout_ms = max(1, round((deadline - time.monotonic()) * 1e3))
        data = stream.exchange(message.SerializeToString(), deadline, self._deadlines)
        answer = inference_pb2.InferStreamResponse.FromString(data)
        if answer.request_id != message.request_id:  # never hand over another moment's actions
            stream.close()
            raise PolicyError(f"the server answered request {answer.request_id} in place of {message.request_id}")
        return answer

    def _take(self) -> Stream:
        with self._lock:
            while self._idle:
                stream = self._idle.pop()
                if not stream.over:
                    return stream
        return self._open()

    def _open(self) -> Stream:
        if self._closed:
            raise PolicyError("the policy is closed")
        return Stream(self._stream_method, self._metadata)

    def _call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        if self._closed:
            raise PolicyError("the policy is closed")
        try:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{_SERVICE}/{method}")
            return call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _wait_ready(self, timeout_s: float | None) -> None:
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        attempts = 0
        while True:
            try:
                self._call("GetMetadata", b"", min(_PROBE_TIMEOUT_S, max(0.1, deadline - time.monotonic())))
                return
            except (UnavailableError, PolicyTimeoutError) as error:
                if time.monotonic() >= deadline:
                    raise UnavailableError(
                        f"no ready server at {self._address} within {timeout_s:g} s: {error.message}"
                    ) from error
                if attempts == 0:
                    logger.info("waiting for the server at %s: %s", self._address, error.message)
            time.sleep(_RETRY_DELAYS_S[min(attempts, len(_RETRY_DELAYS_S) - 1)])
            attempts += 1
