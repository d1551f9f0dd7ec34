"""The QUIC edge beside the gateway: its program's command line, from the settings.

`python -m openpi_flash_cli.edge` becomes that program, where the edge is a container of its own.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from openpi_flash_common.settings import EXIT_CONFIG, EngineSettings, SettingsError, load_settings

from openpi_flash_cli.supervisor import Program

BINARY_VARIABLE = "OPENPI_FLASH_TRANSPORT_BINARY"
BINARY = "openpi-flash-transport"


def find_binary() -> Path | None:
    """The program that the environment names, or the one on the path or beside this Python; None: there is none, and no
    QUIC.

    Raises:
        SettingsError: the environment names one that is not there.
    """
    named = os.environ.get(BINARY_VARIABLE)
    if not named:
        # A virtual environment's programs are not on the path unless it has been activated.
        found = shutil.which(BINARY) or shutil.which(BINARY, path=Path(sys.executable).parent)
        return Path(found) if found else None
    if not os.access(named, os.X_OK):
        raise SettingsError(f"{BINARY_VARIABLE}: {named}: no program that can be run")
    return Path(named)


def edge_program(settings: EngineSettings, binary: Path, directory: Path) -> Program:
    """What runs the edge for these settings.

    Args:
        directory: of this user alone; tokens are put there, since a command line can be read by everybody.

    Raises:
        SettingsError: there is no token where tokens are asked for, or their file cannot be read.
    """
    gateway, telemetry = settings.gateway, settings.telemetry
    argv = [str(binary), "--log-format", settings.log.format, "server"]
    for slot in settings.slots:
        transport = settings.action_transport if slot == "action" else settings.planner_transport
        argv += [f"--{slot}-upstream", f"unix:{transport.unix_socket_path}"]
        argv += [f"--{slot}-listen", _address(gateway.host, transport.quic_port)]
    argv += ["--max-message-bytes", str(min(gateway.max_message_bytes, 64 << 20))]
    argv += ["--max-in-flight", str(gateway.max_in_flight), "--default-timeout-ms", str(gateway.default_timeout_ms)]
    if gateway.tls is not None:
        argv += ["--cert-file", str(gateway.tls.cert_file), "--key-file", str(gateway.tls.key_file)]
        if gateway.tls.client_ca_file is not None:
            argv += ["--client-ca-file", str(gateway.tls.client_ca_file)]
    if gateway.auth is not None:
        tokens = directory / "tokens"
        tokens.touch(mode=0o600)
        tokens.write_text("".join(f"{token}\n" for token in sorted(gateway.auth.load_tokens())))
        argv += ["--tokens-file", str(tokens), "--upstream-token-file", str(tokens)]
    if telemetry.metrics:
        argv += ["--metrics-listen", _address(telemetry.metrics_host, telemetry.edge_metrics_port)]
    if telemetry.otlp_endpoint is not None:
        argv += ["--otlp-endpoint", telemetry.otlp_endpoint]
        argv += ["--trace-sample-ratio", str(telemetry.trace_sample_ratio)]
    return Program("edge", tuple(argv))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main() -> NoReturn:
    """Turns this process into the edge, or ends it where that cannot be."""
    try:
        settings, binary = load_settings(), find_binary()
        if binary is None:
            raise SettingsError(f"no {BINARY} on the path or beside this Python, and {BINARY_VARIABLE} is not set")
        argv = edge_program(settings, binary, Path(tempfile.mkdtemp(prefix="openpi-flash-"))).argv
    except SettingsError as error:
        print(f"openpi-flash-edge: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    os.execv(binary, argv)  # noqa: S606 - our own program


if __name__ == "__main__":
    main()
