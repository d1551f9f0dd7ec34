"""Settings of every service: one JSON file, overridden by `OPENPI_` environment variables, parsed once.

`OPENPI_ACTION__CHECKPOINT_DIR` overrides `action.checkpoint_dir`: `__` nests, case does not matter, an empty value
counts as unset, and lists or whole sections are given as JSON. `OPENPI_DATA_HOME`, `OPENPI_PYTORCH_COMPILE_MODE` and
`OPENPI_JAX_COMPILATION_CACHE_DIR` follow the same rule. Unknown keys are errors; variables that name no section
(Kubernetes makes some) are ignored.
"""

import difflib
import ipaddress
import json
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

EXIT_CONFIG = 2
"""Exit code of a service whose settings or files cannot be used: starting it again would not help."""

CONFIG_PATH_VARIABLE = "INFERENCE_CONFIG_PATH"
_PREFIX = "OPENPI_"

Port = Annotated[int, Field(ge=0, le=65535)]
Mode = Literal["action_only", "planner_only", "combined"]


class SettingsError(Exception):
    """The settings cannot be used; one line per problem."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class TlsSettings(_Section):
    """TLS of one listener."""

    cert_file: Path = Field(description="PEM file with the server's certificate chain.")
    key_file: Path = Field(description="PEM file with the certificate's private key.")
    client_ca_file: Path | None = Field(
        default=None,
        description="PEM file of the CA that signs clients' certificates; set: clients must present one (mTLS).",
    )


class AuthSettings(_Section):
    """Bearer tokens of one listener. A request must carry one of them; health checks need none."""

    tokens: tuple[SecretStr, ...] = Field(default=(), description="Accepted tokens.")
    tokens_file: Path | None = Field(default=None, description="File of accepted tokens, one a line; read at start.")

    def load_tokens(self) -> frozenset[str]:
        """All accepted tokens.

        Raises:
            SettingsError: the file cannot be read, or there is no token at all (which would lock everybody out).
        """
        tokens = {token.get_secret_value() for token in self.tokens}
        if self.tokens_file is not None:
            try:
                tokens.update(line.strip() for line in self.tokens_file.read_text(encoding="utf-8").splitlines())
            except OSError as error:
                raise SettingsError(f"auth.tokens_file: {self.tokens_file}: {error.strerror}") from error
        tokens.discard("")
        if not tokens:
            raise SettingsError("auth: no token is configured; set tokens or tokens_file, or leave auth out")
        return frozenset(tokens)


class WarmUpSettings(_Section):
    """Which shapes are run, and compiled, before the service says that it is ready."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="Batch sizes; null: all that can occur, up to max_batch_size."
    )
    prompt_buckets: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="Padded prompt lengths in tokens; null: all of the model's."
    )


class ModelSettings(_Section):
    """What every service around one model on one accelerator has."""

    default_prompt: str | None = Field(
        default=None, description="Used when an observation has no prompt; null: the config's own."
    )
    device: str = Field(
        default="auto",
        description="`auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`.",
        pattern=r"^[a-z]+(:\d+)?$",
    )
    precision: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="What the model computes in.")
    max_batch_size: int = Field(default=4, ge=1, description="Most waiting requests that share a model call.")
    queue_size: int = Field(
        default=16, ge=1, description="Most requests that wait for the accelerator; more are refused at once."
    )
    warm_up: WarmUpSettings = Field(
        default=WarmUpSettings(), description="What is compiled before the service is ready."
    )
    host: str = Field(default="127.0.0.1", description="Address on which the service listens.")
    grpc_port: Port = Field(default=0, description="gRPC port of the service; 0: any free one.")
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 16, description="Largest message, in either direction.")
    tls: TlsSettings | None = Field(default=None, description="null: plain text.")
    auth: AuthSettings | None = Field(default=None, description="null: no token is asked for.")


class ActionSettings(ModelSettings):
    """The action service: one policy on one accelerator."""

    model_config_name: str = Field(
        description="One of openpi's config names, e.g. `pi05_droid`, or a config file's path."
    )
    checkpoint_dir: str = Field(description="Local path, `gs://` or `hf://` location of the checkpoint.")
    backend: Literal["auto", "torch", "jax"] = Field(
        default="auto", description="auto: by what the checkpoint contains."
    )
    prefix_precision: Literal["fp8"] | None = Field(
        default=None,
        description="`fp8`: matrices of vision tower and VLM in FP8, with PyTorch on a GPU from Ada on; refused at the"
        " start where it moves the actions too far. null: as precision.",
    )
    num_steps: int = Field(default=10, ge=1, le=100, description="Flow steps of a request that names none.")
    real_time_chunking: bool = Field(
        default=False,
        description="Let requests continue a previous chunk; the shapes to be warmed up are then twice as many.",
    )
    grpc_port: Port = Field(default=50052, description="gRPC port of ActionService.")


class IntervalCadence(_Section):
    """A new subtask when the session's last one is older than this."""

    interval_ms: int = Field(ge=1, description="Age in milliseconds at which a subtask is written anew.")


def _parse_cadence(value: Any) -> Any:
    if value in ("every_request", "background") or isinstance(value, IntervalCadence):
        return value
    if isinstance(value, dict) and value.keys() == {"interval_ms"}:
        return IntervalCadence(**value)
    raise ValueError('expected "every_request", "background" or {"interval_ms": N}')


Cadence = Annotated[Literal["every_request", "background"] | IntervalCadence, BeforeValidator(_parse_cadence)]


def _template(*placeholders: str) -> BeforeValidator:
    """A str that has each placeholder, and no other, without format specifications."""
    expected = " and ".join(f"{{{name}}}" for name in placeholders)

    def check(value: Any) -> Any:
        if isinstance(value, str):
            try:
                parts = [part for part in string.Formatter().parse(value) if part[1] is not None]
            except ValueError as error:
                raise ValueError(f"not a valid template ({error}); it must hold {expected}") from error
            if {name for _, name, _, _ in parts} != set(placeholders) or any(
                spec or conv for _, _, spec, conv in parts
            ):
                raise ValueError(f"must hold {expected} and no other placeholder")
        return value

    return BeforeValidator(check)


class PlannerTuning(_Section):
    """What of the planner can be changed while it runs."""

    max_generation_tokens: int = Field(default=20, ge=1, le=256, description="Most tokens of a subtask.")
    generation_prompt_format: Annotated[str, _template("task")] = Field(
        default="Task: {task}. Subtask: ", description="How the task is put to the planner; holds `{task}`."
    )
    action_prompt_template: Annotated[str, _template("task", "subtask")] = Field(
        default="{task}. Subtask: {subtask}", description="The action policy's prompt; holds `{task}` and `{subtask}`."
    )
    temperature: float = Field(
        default=0.0, ge=0, le=10, allow_inf_nan=False, description="0: always the likeliest token."
    )
    top_k: int = Field(default=0, ge=0, le=(1 << 32) - 1, description="Candidates when sampling; 0: all.")
    cadence: Cadence = Field(
        default="every_request",
        description='When a subtask is written: "every_request", {"interval_ms": N}, or "background" (nothing waits).',
    )


class PlannerSettings(ModelSettings, PlannerTuning):
    """The planner service: a pi0.5 model that writes subtasks."""

    checkpoint_dir: str = Field(description="Local path, `gs://` or `hf://` location of the checkpoint.")
    model_config_name: str = Field(
        default="pi05_subtask",
        description="`pi05_subtask`, one of openpi's pi0.5 config names, or a config file's path.",
    )
    timeout_ms: int = Field(
        default=3000, ge=1, description="Most that an action waits for its subtask; then it goes without."
    )
    background_interval_ms: int = Field(
        default=500,
        ge=0,
        description="In the background cadence: least time from the start of a session's subtask to that of its next.",
    )
    max_age_ms: int = Field(
        default=10_000, ge=1, description="In the background cadence: age at which a subtask is no longer used."
    )
    grpc_port: Port = Field(default=50053, description="gRPC port of PlannerService.")


class TransportSettings(_Section):
    """Where robots reach one slot."""

    websocket_port: Port = Field(description="TCP port of openpi's WebSocket protocol.")
    quic_port: Port = Field(description="UDP port of the QUIC edge.")
    unix_socket_path: Path = Field(description="Socket of the edge.")


class ActionTransportSettings(TransportSettings):
    """Where robots reach the action policy, or the combination of planner and policy."""

    websocket_port: Port = Field(default=8000, description="TCP port of openpi's WebSocket protocol.")
    quic_port: Port = Field(default=5555, description="UDP port of the QUIC edge.")
    unix_socket_path: Path = Field(default=Path("/tmp/openpi-action.sock"), description="Socket of the edge.")  # noqa: S108


class PlannerTransportSettings(TransportSettings):
    """Where robots reach the planner alone."""

    websocket_port: Port = Field(default=8002, description="TCP port of openpi's WebSocket protocol.")
    quic_port: Port = Field(default=5556, description="UDP port of the QUIC edge.")
    unix_socket_path: Path = Field(default=Path("/tmp/openpi-planner.sock"), description="Socket of the edge.")  # noqa: S108


class ImageSettings(_Section):
    """How robots are asked to send pictures. The server accepts every encoding all the same."""

    encoding: Literal["lossless", "raw", "png", "jpeg"] = Field(
        default="lossless",
        description="raw and png lose nothing; lossless leaves the choice of the two to the robot, which knows how "
        "fast its link is; jpeg is small.",
    )
    quality: int = Field(default=90, ge=1, le=100, description="JPEG quality.")
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = Field(default="4:2:0", description="JPEG chroma subsampling.")


class BackendSettings(_Section):
    """How the gateway reaches a service."""

    address: str | None = Field(
        default=None,
        description="`host:port`; null: the port of the service's own section, on this machine. Each of several, "
        "joined by commas, and each host that a name stands for, is a replica.",
    )
    ca_file: Path | None = Field(
        default=None, description="PEM file of the CA of the service's certificate; set: the gateway speaks TLS to it."
    )
    client_cert_file: Path | None = Field(default=None, description="The gateway's certificate for mTLS (PEM).")
    client_key_file: Path | None = Field(default=None, description="The private key of that certificate (PEM).")
    token: SecretStr | None = Field(default=None, description="Bearer token that the gateway sends to the service.")

    @model_validator(mode="after")
    def _client_certificate_is_whole(self) -> "BackendSettings":
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise ValueError("client_cert_file and client_key_file go together")
        return self


class AdminSettings(_Section):
    """The HTTP interface for operators: health, and the planner's configuration."""

    host: str = Field(default="127.0.0.1", description="Address on which it listens.")
    port: Port = Field(default=8001, description="TCP port; 0: any free one.")
    token: SecretStr | None = Field(default=None, description="Bearer token asked for; null: none is.")


class GatewaySettings(_Section):
    """The gateway: what robots talk to."""

    host: str = Field(default="0.0.0.0", description="Address on which gRPC and WebSocket listen.")  # noqa: S104
    grpc_port: Port = Field(default=50051, description="gRPC port of PolicyService.")
    action: BackendSettings = Field(default=BackendSettings(), description="How the action service is reached.")
    planner: BackendSettings = Field(default=BackendSettings(), description="How the planner service is reached.")
    admin: AdminSettings | None = Field(default=AdminSettings(), description="HTTP for operators; null: none.")
    planner_start_timeout_ms: int = Field(
        default=600_000,
        ge=0,
        description="In combined mode, how long after its start the gateway waits for the planner to be ready; then it "
        "serves actions without.",
    )
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 16, description="Largest message, in either direction.")
    max_in_flight: int = Field(default=64, ge=1, description="Most requests at once; more are refused at once.")
    default_timeout_ms: int = Field(
        default=30_000, ge=1, description="Time that a request without a deadline may take."
    )
    images: ImageSettings = Field(default=ImageSettings(), description="How robots are asked to send pictures.")
    tls: TlsSettings | None = Field(default=None, description="null: plain text.")
    auth: AuthSettings | None = Field(default=None, description="null: no token is asked for.")


class TelemetrySettings(_Section):
    """Traces and metrics; both off unless configured."""

    otlp_endpoint: str | None = Field(
        default=None,
        description="OTLP gRPC endpoint for traces, e.g. `http://localhost:4317` (https: TLS); null: no traces.",
        pattern=r"^https?://[^/\s]+$",
    )
    trace_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of traces kept among those that no caller has decided about."
    )
    metrics: bool = Field(default=False, description="Serve Prometheus metrics over HTTP.")
    metrics_host: str = Field(default="127.0.0.1", description="Address on which metrics are served.")
    gateway_metrics_port: Port = Field(default=9090, description="Metrics port of the gateway.")
    action_metrics_port: Port = Field(default=9091, description="Metrics port of the action service.")
    planner_metrics_port: Port = Field(default=9092, description="Metrics port of the planner service.")
    edge_metrics_port: Port = Field(default=9093, description="Metrics port of the QUIC edge.")


class LogSettings(_Section):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level written."
    )
    format: Literal["text", "json"] = Field(default="text", description="`text` for people, `json` for log collectors.")


class EngineSettings(_Section):
    """Everything that is configured. At least one of `action` and `planner` is there."""

    action: ActionSettings | None = Field(default=None, description="The action service; null: none.")
    planner: PlannerSettings | None = Field(default=None, description="The planner service; null: none.")
    action_transport: ActionTransportSettings = Field(
        default=ActionTransportSettings(), description="Ports of the action side."
    )
    planner_transport: PlannerTransportSettings = Field(
        default=PlannerTransportSettings(), description="Ports of the planner side."
    )
    gateway: GatewaySettings = Field(default=GatewaySettings(), description="The gateway.")
    telemetry: TelemetrySettings = Field(default=TelemetrySettings(), description="Traces and metrics.")
    log: LogSettings = Field(default=LogSettings(), description="Logs.")
    data_home: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default=Path("~/.cache/openpi"), description="Where downloads are cached.", validate_default=True
    )
    pytorch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = (
        Field(None, description="Mode of torch.compile; null: not compiled. On a GPU all run in CUDA graphs.")
    )
    jax_compilation_cache_dir: Annotated[Path, AfterValidator(Path.expanduser)] | None = Field(
        default=None,
        description="Where JAX keeps compiled programs from one start to the next; null: in compiled/jax below "
        "data_home, and for a CPU nowhere. One that is named is used for a CPU as well: do not share it between "
        "machines.",
    )

    @model_validator(mode="after")
    def _has_a_backend(self) -> "EngineSettings":
        if self.action is None and self.planner is None:
            raise ValueError("nothing to serve: at least one of the sections action and planner is needed")
        return self

    @property
    def mode(self) -> Mode:
        """What the server does, derived from what is configured."""
        if self.action is not None and self.planner is not None:
            return "combined"
        return "action_only" if self.action is not None else "planner_only"

    @property
    def slots(self) -> tuple[str, ...]:
        """The configured backends, of `action` and `planner`."""
        return tuple(name for name in ("action", "planner") if getattr(self, name) is not None)

    @property
    def action_address(self) -> str | None:
        """`host:port`, or several joined by commas, where the gateway finds the action service; None: there is none."""
        return _address(self.gateway.action, self.action)

    @property
    def planner_address(self) -> str | None:
        """`host:port`, or several joined by commas, where the gateway finds the planner; None where there is none."""
        return _address(self.gateway.planner, self.planner)


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> EngineSettings:
    """Reads the settings.

    Args:
        path: the JSON file; None: the one that INFERENCE_CONFIG_PATH names, or none at all.
        environ: environment; None: the process's own.

    Raises:
        SettingsError: the file cannot be read, or the settings cannot be used.
    """
    environ = os.environ if environ is None else environ
    if path is None and environ.get(CONFIG_PATH_VARIABLE):
        path = Path(environ[CONFIG_PATH_VARIABLE])
    merged = {} if path is None else _read_json(path)
    variables = _overlay(merged, environ)
    try:
        return EngineSettings.model_validate(merged)
    except ValidationError as error:
        source = str(path) if path is not None else f"the environment (no file: {CONFIG_PATH_VARIABLE} is not set)"
        lines = [f"invalid settings in {source}:"]
        lines += [f"  {_describe(problem, variables)}" for problem in error.errors(include_url=False)]
        raise SettingsError("\n".join(lines)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"the settings file {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"the settings file {path} must hold a JSON object, not {type(value).__name__}")
    return value


def _overlay(target: dict[str, Any], environ: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Writes the environment's overrides into `target`; returns which variable set which path."""
    variables = {}
    for name, text in sorted(environ.items()):
        path = tuple(name.removeprefix(_PREFIX).lower().split("__"))
        if not name.startswith(_PREFIX) or not text or (len(path) == 1 and path[0] not in EngineSettings.model_fields):
            continue
        node = target
        for key in path[:-1]:
            child = node.get(key)
            if not isinstance(child, dict):  # absent, null, or a value that this variable replaces by a section
                child = node[key] = {}
            node = child
        node[path[-1]] = _parse_variable(text, path)
        variables[path] = name
    return variables


def _parse_variable(text: str, path: tuple[str, ...]) -> Any:
    """JSON where the field is a list, a section or null; otherwise the text, which pydantic turns into numbers."""
    field = _field(path)
    takes_text = field is not None and any(kind in (str, SecretStr, Path) for kind in _alternatives(field.annotation))
    if text == "null" or (text[0] in "[{" and not takes_text):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _describe(problem: Any, variables: Mapping[tuple[str, ...], str]) -> str:
    path = tuple(str(part) for part in problem["loc"])
    setters = [variable for key, variable in variables.items() if key[: len(path)] == path]
    name = setters[0] if len(setters) == 1 else ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
        return f"{name}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{name}: required, but not set"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _field(path: tuple[str, ...]) -> Any:
    return _fields(path[:-1]).get(path[-1])


def _fields(path: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the section at `path`; empty where there is no section."""
    fields: dict[str, Any] = dict(EngineSettings.model_fields)
    for key in path:
        kinds = _alternatives(fields[key].annotation) if key in fields else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        fields = dict(section.model_fields) if section else {}
    return fields


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Members of a union; the annotation itself when it is none. Literals stay whole."""
    return tuple(get_args(annotation)) if type(None) in get_args(annotation) else (annotation,)


def _address(backend: BackendSettings, service: ModelSettings | None) -> str | None:
    if service is None:
        return None
    return backend.address or f"{reachable(service.host)}:{service.grpc_port}"


def reachable(host: str) -> str:
    """The address at which this machine reaches a listener on `host`."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return str(address) if address.version == 4 else f"[{address}]"
