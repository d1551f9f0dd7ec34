"""What every policy on a server does, whatever the transport: requests, chunks, sessions, and how pictures are sent."""

import abc
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from openpi_flash.v1 import inference_pb2

from openpi_flash_client.chunks import ActionChunks, default_horizon
from openpi_flash_client.codec import read_metadata, read_response, write_request
from openpi_flash_client.errors import (
    InvalidArgumentError,
    PolicyError,
    PolicyTimeoutError,
    UnavailableError,
    closed_error,
)
from openpi_flash_client.pictures import Cameras, PictureError, read_cameras
from openpi_flash_client.waiting import at_once, run

logger = logging.getLogger(__name__)

_RETRY_DELAYS_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_PROBE_TIMEOUT_S = 5.0

ANSWERS: dict[str, Any] = {
    "Infer": inference_pb2.InferResponse,
    "GetMetadata": inference_pb2.GetMetadataResponse,
    "Reset": inference_pb2.ResetResponse,
}


class Call(NamedTuple):
    """A call of PolicyService.

    Attributes:
        method: `Infer`, `GetMetadata` or `Reset`.
        message: what it asks; of `Infer` an InferStreamRequest, of which a transport may use the request alone.
        pictures: of the observation, to be prepared and sent with the message.
        timeout_s: time that it was given, for messages.
        deadline: its end, on the clock of `time.monotonic`.
    """

    method: str
    message: Any
    pictures: Sequence[Any]
    timeout_s: float
    deadline: float

    @property
    def time_left_s(self) -> float:
        return max(0.001, self.deadline - time.monotonic())


class RemotePolicy(abc.ABC):
    """A policy on a server. May be used by several threads at once, unless with an open_loop_horizon.

    Attributes:
        session_id: groups what the server keeps for this robot.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float,
        session_id: str | None,
        open_loop_horizon: int | None,
        prefetch_steps: int,
    ) -> None:
        horizon = default_horizon() if open_loop_horizon is None else open_loop_horizon
        self._chunks = None if horizon is None else ActionChunks(horizon, prefetch=prefetch_steps)
        self.session_id = uuid.uuid4().hex if session_id is None else session_id
        self._address = address
        self._timeout_s = timeout_s
        self._closed = False
        self._cameras: Cameras = {}
        self._cameras_since = 0  # connections lost when they were asked for; less than 0: they may be out of date

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
                It may also hold the options `seed`, `noise`, `num_steps` and `mode`; those given here go before. To
                continue a chunk: `previous_actions`, `inference_delay` and `execution_horizon` (see InferRequest).
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
        obs = with_options(obs, seed=seed, noise=noise, num_steps=num_steps, mode=mode)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        exchange = at_once(self._exchange)

        def ask(obs: Mapping[str, Any], deadline: float) -> dict[str, Any]:
            return run(self._infer_chunk(obs, exchange, limit_s, deadline, traceparent))

        if self._chunks is None:
            return ask(obs, time.monotonic() + limit_s)
        return self._chunks.infer(obs, ask, limit_s)

    def reset(self) -> None:
        """Makes the server forget this robot's session, and drops the chunk whose steps are being served.

        Raises:
            PolicyError: the server did not do so.
        """
        if self._chunks is not None:
            self._chunks.reset()
        self._exchange(self._call("Reset", inference_pb2.ResetRequest(session_id=self.session_id)))

    def get_server_metadata(self) -> dict[str, Any]:
        """What openpi's own server would tell (e.g. `reset_pose`) and, beside it, what this one serves and expects:
        `model_config_name`, `backend`, `action_horizon`, `image_specs`, `tensor_specs` and so on, as in
        GetMetadataResponse.

        Raises:
            PolicyError: the server did not answer.
        """
        return read_metadata(self._exchange(self._call("GetMetadata", inference_pb2.GetMetadataRequest())))

    def close(self) -> None:
        """Ends the connection, and with it requests in flight, by a PolicyError of code `CANCELLED`."""
        self._closed = True
        if self._chunks is not None:
            self._chunks.close()
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _exchange(self, call: Call) -> Any:
        """Makes a call; the answer is the method's in ANSWERS. Raises PolicyErrors, and PictureError."""

    @abc.abstractmethod
    def _disconnect(self) -> None: ...

    @property
    @abc.abstractmethod
    def _num_lost(self) -> int:
        """Connections that were lost: after each the server may be another."""

    def _wait_ready(self, timeout_s: float | None) -> None:
        """Asks for the metadata until they come, or closes the policy.

        Raises:
            PolicyError: they did not, or the server would not have us.
        """
        try:
            self._ask_until_ready(timeout_s)
        except BaseException:
            self.close()
            raise

    def _ask_until_ready(self, timeout_s: float | None) -> None:
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        attempts = 0
        while True:
            time_left_s = min(_PROBE_TIMEOUT_S, max(0.1, deadline - time.monotonic()))
            try:
                run(self._read_cameras(at_once(self._exchange), time_left_s))
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

    def _call(self, method: str, message: Any, pictures: Sequence[Any] = (), timeout_s: float | None = None) -> Call:
        if self._closed:
            raise closed_error()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Call(method, message, pictures, timeout_s, time.monotonic() + timeout_s)

    async def _infer_chunk(
        self, obs: Mapping[str, Any], exchange: "Exchange", timeout_s: float, deadline: float, traceparent: str
    ) -> dict[str, Any]:
        message = inference_pb2.InferStreamRequest(traceparent=traceparent)
        call = self._call("Infer", message, timeout_s=timeout_s)._replace(deadline=deadline)
        if self._cameras_since != self._num_lost:
            try:
                await self._read_cameras(exchange, call.time_left_s)
            except PolicyError as error:  # the request itself will meet it, or do without
                logger.info("%s did not say how it wants pictures: %s", self._address, error)
        cameras = self._cameras
        while True:
            message.request.session_id = self.session_id
            call = call._replace(pictures=write_request(message.request, obs, cameras))
            try:
                return read_response(await exchange(call))
            except PictureError as error:
                # As it is: the server says best what is wrong with it.
                cameras = {name: camera for name, camera in cameras.items() if name != error.args[0]}
                message.ClearField("request")
            except InvalidArgumentError:
                self._cameras_since = -1
                raise

    async def _read_cameras(self, exchange: "Exchange", timeout_s: float) -> None:
        since = self._num_lost
        answer = await exchange(self._call("GetMetadata", inference_pb2.GetMetadataRequest(), timeout_s=timeout_s))
        self._cameras, self._cameras_since = read_cameras(answer.image_specs), since


Exchange = Callable[[Call], Awaitable[Any]]
"""`RemotePolicy._exchange`, for code that awaits."""


def with_options(obs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The observation, and over it the options that are not None."""
    return {**obs, **{name: value for name, value in options.items() if value is not None}}
