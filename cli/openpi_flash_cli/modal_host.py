"""What the apps in deploy/modal run in their containers, and how a robot finds them: through a Modal Dict.

The Dict is private to the Modal account. It holds a token that every robot has to show (`token`), where a running
tunnel leads to (`tunnel`), and what QUIC through NAT needs (`openpi_flash_client.portal`).
"""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from openpi_flash_client import portal
from openpi_flash_common.settings import EngineSettings, SettingsError, TransportSettings, load_settings

from openpi_flash_cli.serve import serving

DICT = "openpi-flash"
"""Name of the Dict unless OPENPI_MODAL_DICT names another."""

TOKEN_KEY = "token"  # noqa: S105 - a key, no token
TUNNEL_KEY = "tunnel"
AUTH_VARIABLE = "OPENPI_GATEWAY__AUTH"

_CERTIFICATE_TIMEOUT_S = 60.0

Forward = Callable[..., AbstractContextManager[Any]]
"""`modal.forward`: from a port of the container to a tunnel with the attributes `url` and `tls_socket`."""


def dict_name() -> str:
    """Name of the Dict that the apps and their robots use unless told otherwise."""
    return os.environ.get("OPENPI_MODAL_DICT") or DICT


def open_dict(name: str | None) -> portal.Store:
    """The Modal Dict of that name; None: of the usual one.

    Raises:
        SettingsError: Modal's package is not installed, or there is no such Dict, or no account.
    """
    try:
        import modal
    except ImportError as error:
        install = "$(make -s uv) pip install --python .venv -r requirements/modal.txt"  # a .venv of uv has no pip
        raise SettingsError(f"this needs Modal's package: {install}") from error
    name = name or dict_name()
    try:
        return modal.Dict.from_name(name).hydrate()
    except modal.exception.Error as error:
        raise SettingsError(f"the Modal Dict {name}: {error}") from error


def require_token(store: portal.Store) -> None:
    """Has the gateway ask for the token in the store, which is made there first, unless tokens are configured.

    For the whole process and its children, before settings are loaded: what Modal serves is on the internet.
    """
    if load_settings().gateway.auth is None:
        store.put(TOKEN_KEY, secrets.token_urlsafe(32), skip_if_exists=True)
        os.environ[AUTH_VARIABLE] = json.dumps({"tokens": [store.get(TOKEN_KEY)]})


def serve_tunnel(store: portal.Store, forward: Forward) -> int:
    """Runs the engine behind two tunnels, WebSocket's and gRPC's, and publishes where they lead to.

    Returns:
        The engine's exit code.
    """
    require_token(store)
    settings = load_settings()
    port = _transport(settings).websocket_port
    with (
        serving() as engine,
        forward(port) as websocket,
        forward(settings.gateway.grpc_port, h2_enabled=True) as grpc,
    ):
        _wait_listening(port, engine)
        store.put(TUNNEL_KEY, {"websocket": websocket.url.replace("http", "ws", 1), "grpc": list(grpc.tls_socket)})
        try:
            return engine.wait()
        finally:
            store.pop(TUNNEL_KEY, None)


def serve_quic(store: portal.Store, stun_servers: Sequence[portal.Address] | None = None) -> int:
    """Runs the engine with its QUIC edge, and joins robots to the edge through NAT.

    QUIC_RELAY_IP (an address, `:port` may follow) names a relay, QUIC_RELAY_KEY is its key, and with QUIC_RELAY_ONLY=1
    no direct path is tried.

    Returns:
        The engine's exit code.

    Raises:
        SettingsError: there is no edge, or relay settings contradict each other.
    """
    relay = relay_from(os.environ)
    require_token(store)
    settings = load_settings()
    stop = threading.Event()
    with serving() as engine:

        def watch() -> None:
            engine.wait()
            stop.set()

        threading.Thread(target=watch, daemon=True).start()
        fingerprint = _fingerprint(settings, engine)
        upstream = ("127.0.0.1", _transport(settings).quic_port)
        portal.serve(store, upstream, fingerprint, stop, stun_servers=stun_servers, **relay)
        return engine.wait()


def relay_from(environ: Any) -> dict[str, Any]:
    """What QUIC_RELAY_IP, QUIC_RELAY_ONLY and QUIC_RELAY_KEY say, as `portal.serve` takes it.

    Raises:
        SettingsError: they contradict each other.
    """
    host, _, port = environ.get("QUIC_RELAY_IP", "").partition(":")
    key, only = environ.get("QUIC_RELAY_KEY", ""), environ.get("QUIC_RELAY_ONLY", "").lower()
    if only not in ("", "0", "1", "false", "true"):
        raise SettingsError("QUIC_RELAY_ONLY: expected 1 or 0")
    if port and not port.isdecimal():
        raise SettingsError("QUIC_RELAY_IP: expected an address, or address:port")
    is_only = only in ("1", "true")
    if is_only and not host:
        raise SettingsError("QUIC_RELAY_ONLY: is set, but QUIC_RELAY_IP names no relay")
    if host and not key:
        raise SettingsError("QUIC_RELAY_KEY: not set; it is the key that the relay was started with")
    address = (host, int(port or portal.RELAY_PORT)) if host else None
    return {"relay": address, "relay_only": is_only, "relay_key": key}


def _wait_listening(port: int, engine: subprocess.Popen[bytes]) -> None:
    """Returns when robots can connect, who then wait until all is warm, or when the engine has ended."""
    while engine.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)


def _transport(settings: EngineSettings) -> TransportSettings:
    return settings.action_transport if settings.action is not None else settings.planner_transport


def _fingerprint(settings: EngineSettings, engine: subprocess.Popen[bytes]) -> str:
    """Of the edge's certificate, once it has one."""
    if settings.gateway.tls is not None:
        path = settings.gateway.tls.cert_file
    else:
        state = os.environ.get("OPENPI_FLASH_STATE_DIR") or Path.home() / ".local/state/openpi-flash"
        path = Path(state) / "edge-cert.pem"
    deadline = time.monotonic() + _CERTIFICATE_TIMEOUT_S
    while engine.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or not whole
            first, end, _ = path.read_text().partition(ssl.PEM_FOOTER)
            return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first + end)).hexdigest()
        time.sleep(0.1)
    raise SettingsError(f"{path}: no certificate; is the QUIC edge installed?")
