"""HTTP for operators: health, and the planner's configuration, with a page to try them at `/docs`."""

import asyncio
import contextlib
import hmac
import logging
import socket
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import uvicorn
from fastapi import Body, Depends, FastAPI, HTTPException, Response, status
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from google.protobuf.json_format import MessageToDict
from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import InvalidArgumentError, ServiceError, UnavailableError
from openpi_flash_common.settings import AdminSettings, EngineSettings, Mode, PlannerTuning, SettingsError
from pydantic import BaseModel, Field, SecretStr

from openpi_flash_gateway.endpoint import Endpoint
from openpi_flash_gateway.planner_backend import PlannerBackend
from openpi_flash_gateway.subtasks import Subtasks

logger = logging.getLogger(__name__)
logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it tells of every start and stop

_STOP_TIMEOUT_S = 2
_LOOPBACK = ("127.0.0.1", "localhost")


class Replica(BaseModel):
    """One planner."""

    address: str = Field(description="`ip:port`.")
    ready: bool = Field(description="Whether it can write subtasks now.")
    reason: str = Field(description="Why not; empty when it is ready.")


class Slot(BaseModel):
    """One of the things that are served."""

    ready: bool = Field(description="Whether requests are answered.")
    reason: str = Field(description="Why not; empty when they are.")
    replicas: list[Replica] | None = Field(default=None, description="Of the planner: its replicas.")


class Health(BaseModel):
    """How the server is."""

    status: str = Field(description="`ok`; `degraded`: actions are served without subtasks; `unavailable`.")
    mode: str = Field(description="`action_only`, `planner_only` or `combined`.")
    slots: dict[str, Slot] = Field(description="`action` and `planner`, as far as configured.")


class ReplicaConfig(BaseModel):
    """The configuration at one replica."""

    address: str = Field(description="`ip:port`.")
    config: dict[str, Any] | None = Field(description="What is in force there; null when it is not known.")
    error: str = Field(description="Why it is not known, or was not changed there; empty otherwise.")


class Config(BaseModel):
    """The planner's configuration."""

    cadence: Any = Field(description="When subtasks are written; null where there is no action policy.")
    replicas: list[ReplicaConfig] = Field(
        description="One that is away now takes the changes that were made when it returns."
    )


class AdminServer:
    """The listener.

    Attributes:
        port: bound TCP port; known after `start`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        endpoints: Mapping[str, Endpoint],
        planner: PlannerBackend | None,
        subtasks: Subtasks | None,
    ) -> None:
        admin = settings.gateway.admin or AdminSettings()
        self.port = 0
        self._address = (admin.host, admin.port)
        app = _app(admin, settings.mode, endpoints, planner, subtasks)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_STOP_TIMEOUT_S
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens.

        Raises:
            SettingsError: the port cannot be bound.
        """
        host, port = self._address
        try:
            listener = socket.create_server(
                self._address, family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=32
            )
        except OSError as error:
            raise SettingsError(f"gateway.admin.port: cannot listen on {host}:{port}: {error.strerror}") from error
        self.port = listener.getsockname()[1]
        logger.info("listening for operators", extra={"port": self.port})
        self._serving = asyncio.create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        """Answers what is in flight and closes."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the gateway's own


def _app(
    admin: AdminSettings,
    mode: Mode,
    endpoints: Mapping[str, Endpoint],
    planner: PlannerBackend | None,
    subtasks: Subtasks | None,
) -> FastAPI:
    # The page brings its own script and style: a robot's network need not reach the internet.
    app = FastAPIOffline(title="openpi-flash", description="Health and planner configuration.", redoc_url=None)
    if admin.host in _LOOPBACK:  # a page in a browser on this machine may not get here under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK))
    protected = [Depends(_authorization(admin.token))]

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether robots are answered. Needs no token. 503 while they are not."""
        slots = {name: _slot(endpoint) for name, endpoint in endpoints.items()}
        if planner is not None:
            slots["planner"].replicas = [
                Replica(address=replica.address, ready=not replica.not_ready_reason, reason=replica.not_ready_reason)
                for replica in planner.replicas
            ]
        ready = [slot.ready for slot in slots.values()]
        if not ready[0]:
            response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
        word = "ok" if all(ready) else "degraded" if ready[0] else "unavailable"
        return Health(status=word, mode=mode, slots=slots)

    @app.get("/config", dependencies=protected)
    async def config() -> Config:
        """The planner's configuration, as each replica has it."""
        return _config(await _required(planner).configs(), subtasks)

    @app.patch("/config", dependencies=protected)
    async def change(
        changes: Annotated[PlannerTuning, Body(examples=[{"max_generation_tokens": 24, "cadence": "background"}])],
    ) -> Config:
        """Changes the fields that are given, from the next subtask on, at every replica; says which took the change."""
        backend = _required(planner)
        fields = changes.model_dump(exclude_unset=True, exclude={"cadence"})
        new_cadence = changes.cadence if "cadence" in changes.model_fields_set else None
        if new_cadence is not None and subtasks is None:
            raise HTTPException(status.HTTP_422_UNPROCESSABLE_CONTENT, "cadence: there is no action policy")
        try:
            results = await (backend.update(planner_pb2.UpdateConfigRequest(**fields)) if fields else backend.configs())
        except InvalidArgumentError as error:
            raise HTTPException(status.HTTP_422_UNPROCESSABLE_CONTENT, error.message) from error
        except UnavailableError as error:
            raise HTTPException(status.HTTP_503_SERVICE_UNAVAILABLE, error.message) from error
        if new_cadence is not None and subtasks is not None:
            subtasks.cadence = new_cadence
        return _config(results, subtasks)

    return app


def _authorization(token: SecretStr | None) -> Any:
    async def check(
        sent: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if token is None:
            return
        given = sent.credentials if sent is not None else ""
        if not hmac.compare_digest(given.encode(), token.get_secret_value().encode()):
            raise HTTPException(
                status.HTTP_401_UNAUTHORIZED,
                "a valid token is required (Authorization: Bearer …)",
                {"WWW-Authenticate": "Bearer"},
            )

    return check


def _slot(endpoint: Endpoint) -> Slot:
    return Slot(ready=not endpoint.not_ready_reason, reason=endpoint.not_ready_reason)


def _required(planner: PlannerBackend | None) -> PlannerBackend:
    if planner is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "this server has no planner, and so no configuration to change")
    return planner


def _config(results: Mapping[str, planner_pb2.PlannerConfig | ServiceError], subtasks: Subtasks | None) -> Config:
    replicas = [
        ReplicaConfig(address=address, config=None, error=f"{result.code.name}: {result.message}")
        if isinstance(result, ServiceError)
        else ReplicaConfig(
            address=address,
            config=MessageToDict(result, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
            error="",
        )
        for address, result in results.items()
    ]
    return Config(cadence=None if subtasks is None else subtasks.cadence, replicas=replicas)
