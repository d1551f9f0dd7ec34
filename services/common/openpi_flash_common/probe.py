"""`python -m openpi_flash_common.probe SERVICE`: whether a service on this machine, or in this container, is ready.

For health checks that run a command, such as Docker's; Kubernetes asks over gRPC itself. It finds the service by the
settings that the service was started with.
"""

import argparse
import sys
import urllib.error
import urllib.request
from typing import Literal, get_args

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from openpi_flash_common.settings import EngineSettings, SettingsError, load_settings, reachable

Probed = Literal["action", "planner", "gateway", "edge"]


class NotReadyError(Exception):
    """The service is not ready; the message says why."""


def check(service: Probed, settings: EngineSettings, timeout_s: float = 5.0) -> None:
    """Returns when the service says that it is ready.

    Raises:
        NotReadyError: it does not, or cannot be reached.
        SettingsError: these settings say nothing about it, or nothing that could be asked.
    """
    if service == "edge":
        _check_http(_edge_url(settings), timeout_s)
    else:
        _check_grpc(_grpc_target(service, settings), timeout_s)


def _edge_url(settings: EngineSettings) -> str:
    telemetry = settings.telemetry
    if not telemetry.metrics:
        raise SettingsError("telemetry.metrics: the edge tells its health where its metrics are, and they are off")
    return f"http://{reachable(telemetry.metrics_host)}:{telemetry.edge_metrics_port}/healthz"


def _grpc_target(service: Probed, settings: EngineSettings) -> str:
    if service == "gateway":  # its sockets have no TLS, and of tokens health alone is free
        slot = settings.action_transport if settings.action is not None else settings.planner_transport
        return f"unix:{slot.unix_socket_path}"
    model = getattr(settings, service)
    if model is None:
        raise SettingsError(f"{service}: not configured")
    if model.tls is not None:
        raise SettingsError(f"{service}.tls: a listener with TLS is to be checked from where its CA is known")
    return f"{reachable(model.host)}:{model.grpc_port}"


def _check_grpc(target: str, timeout_s: float) -> None:
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise NotReadyError(f"{target}: {error.code().name}: {error.details()}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise NotReadyError(f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _check_http(url: str, timeout_s: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=timeout_s).close()
    except (urllib.error.URLError, OSError) as error:
        raise NotReadyError(f"{url}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Asks once; returns the exit status, 0 where the service is ready."""
    parser = argparse.ArgumentParser(prog="openpi-flash-probe", description="Whether a service is ready.")
    parser.add_argument("service", choices=get_args(Probed))
    try:
        check(parser.parse_args(arguments).service, load_settings())
    except (NotReadyError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
