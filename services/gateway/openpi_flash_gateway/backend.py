"""A service behind the gateway: its channel, whether it is ready, and its unary calls."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openpi_flash_common.errors import InternalError, ServiceError, UnavailableError, from_rpc_error
from openpi_flash_common.settings import BackendSettings, SettingsError
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

logger = logging.getLogger(__name__)

OnChange = Callable[[], Awaitable[None]]
MessageT = TypeVar("MessageT", bound=Message)

_RETRY_DELAYS_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_ENVELOPE_BYTES = 4096  # what a stream's envelope may add to a request of the largest accepted size


@dataclasses.dataclass(frozen=True)
class Access:
    """What the gateway shows a service, read once.

    Attributes:
        credentials: of TLS; None: plain text.
        metadata: of every call: the token, where there is one.
    """

    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def load(cls, settings: BackendSettings) -> "Access":
        """Raises SettingsError where a certificate or key cannot be read."""
        token = settings.token
        metadata = (("authorization", f"Bearer {token.get_secret_value()}"),) if token else ()
        if settings.ca_file is None:
            return cls(None, metadata)
        files = (settings.ca_file, settings.client_key_file, settings.client_cert_file)
        try:
            ca, key, certificate = (file.read_bytes() if file is not None else None for file in files)
        except OSError as error:
            raise SettingsError(
                f"gateway: a certificate or key cannot be read: {error.filename}: {error.strerror}"
            ) from error
        return cls(grpc.ssl_channel_credentials(ca, key, certificate), metadata)


class Backend:
    """One service at one address. Connects when it is first used.

    Attributes:
        not_ready_reason: why the service cannot be used now, for people; empty: it is warm and within reach.
        num_in_flight: requests that it is working on.
    """

    def __init__(
        self, name: str, service: str, address: str, access: Access, *, max_message_bytes: int, host: str
    ) -> None:
        """Describes the service.

        Args:
            name: for people, e.g. `action service at 10.0.0.7:50052`.
            service: full name, e.g. `openpi_flash.v1.ActionService`.
            address: `ip:port`.
            host: whom the certificate must name.
        """
        self.name = name
        self.not_ready_reason = f"the {name} has not been reached yet"
        self.num_in_flight = 0
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._service = service
        self._channel = _channel(address, access, max_message_bytes, host)
        self._call_metadata = access.metadata

    async def call(self, method: str, request: bytes, deadline: float, trace: TraceContext = NO_TRACE) -> bytes:
        """One unary call, serialized in and out.

        Raises:
            ServiceError: what the service answered, or that it did not.
        """
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{self._service}/{method}")
        metadata = (*self._call_metadata, *trace.to_metadata())
        with self.busy():
            try:
                return await call(request, timeout=deadline - time.monotonic(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise UnavailableError(f"the {self.name} cancelled the call") from error
                raise from_rpc_error(error) from error
            except grpc.aio.UsageError as error:
                raise self.closed_error() from error
            except asyncio.CancelledError as error:
                if is_given_up():
                    raise
                raise UnavailableError(f"the connection to the {self.name} was closed") from error

    async def ask(
        self, method: str, request: bytes, answer: type[MessageT], deadline: float, trace: TraceContext = NO_TRACE
    ) -> MessageT:
        """One unary call, as `call`, and its answer parsed."""
        data = await self.call(method, request, deadline, trace)
        try:
            return answer.FromString(data)
        except DecodeError as error:
            raise InternalError(f"the {self.name} did not answer with a {answer.DESCRIPTOR.name}") from error

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Counts a request."""
        self.num_in_flight += 1
        self._all_answered.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._all_answered.set()

    def closed_error(self) -> UnavailableError:
        """What a request gets that came just after the end."""
        return UnavailableError(f"the {self.name} is no longer used")

    async def watch(self, on_change: OnChange) -> None:
        """Follows the service's health until cancelled; tells of each change of `not_ready_reason`."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        failures = 0
        while True:
            health = stub.Watch(health_pb2.HealthCheckRequest(service=self._service))
            try:
                async for update in health:
                    if update.status == health_pb2.HealthCheckResponse.SERVING:
                        await self.on_serving()
                        failures = 0
                        await self._set_ready("", on_change)
                    else:
                        await self._set_ready(f"the {self.name} is not serving; it may be warming up", on_change)
                problem = f"the {self.name} ended the health watch"
            except grpc.aio.AioRpcError as error:
                problem = f"the {self.name} is out of reach ({error.code().name}: {error.details()})"
            except ServiceError as error:
                problem = f"the {self.name} does not describe itself ({error.code.name}: {error.message})"
            finally:
                health.cancel()
            await self._set_ready(problem, on_change)
            await asyncio.sleep(_RETRY_DELAYS_S[min(failures, len(_RETRY_DELAYS_S) - 1)])
            failures += 1

    async def on_serving(self) -> None:
        """What is to be done before the service counts as ready.

        Raises:
            ServiceError: it could not be done; it is tried again later.
        """

    async def retire(self) -> None:
        """Closes, once the requests in flight have ended; at once when cancelled."""
        try:
            await self._all_answered.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends every call."""
        await self._channel.close()

    async def _set_ready(self, problem: str, on_change: OnChange) -> None:
        if problem == self.not_ready_reason:
            return
        was_ready, self.not_ready_reason = not self.not_ready_reason, problem
        if problem:
            logger.log(logging.WARNING if was_ready else logging.INFO, "%s", problem)
        await on_change()


def is_given_up() -> bool:
    """Whether a CancelledError is meant for the running task.

    If not, it is grpc's way to say that a call has ended with its channel.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _channel(address: str, access: Access, max_message_bytes: int, host: str) -> grpc.aio.Channel:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", max_message_bytes + _ENVELOPE_BYTES),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),  # a proxy of the environment is meant for the outside
    ]
    if access.credentials is None:
        return grpc.aio.insecure_channel(address, options)
    options.append(("grpc.ssl_target_name_override", host))
    return grpc.aio.secure_channel(address, access.credentials, options)
