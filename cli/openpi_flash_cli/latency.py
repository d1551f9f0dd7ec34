"""`openpi-flash test ws|grpc|quic HOST`, `test modal-tunnel|modal-quic`: where the time of a call to a server goes."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from openpi_flash_common.settings import SettingsError
from rich.console import Console
from rich.table import Table

from openpi_flash_cli import modal_host
from openpi_flash_cli.scene import camera_picture

if TYPE_CHECKING:
    from openpi_flash_client.portal import Store
    from openpi_flash_client.remote import RemotePolicy

TIMED_CALLS = 5

Calls = list[dict[str, float]]
"""For each timed call its `round_trip_ms`, `server_ms` and `policy_ms`."""

Infer = Callable[[dict[str, Any]], Mapping[str, Any]]

ROBOTS: dict[str, dict[str, Any]] = {
    "aloha": {
        "images": dict.fromkeys(("cam_high", "cam_left_wrist", "cam_right_wrist"), (3, 224, 224)),
        "state": (14,),
    },
    "droid": {
        "observation/exterior_image_1_left": (224, 224, 3),
        "observation/wrist_image_left": (224, 224, 3),
        "observation/joint_position": (7,),
        "observation/gripper_position": (1,),
    },
    "libero": {
        "observation/image": (224, 224, 3),
        "observation/wrist_image": (224, 224, 3),
        "observation/state": (8,),
    },
}
"""What each robot sends over WebSocket, where the server cannot say so: nested names and shapes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "transport",
        choices=("ws", "grpc", "quic", "modal-tunnel", "modal-quic"),
        help="ws: openpi's WebSocket protocol; grpc: PolicyService; quic: the same over QUIC; modal-tunnel: WebSocket"
        " through a Modal tunnel; modal-quic: QUIC to a Modal container, through NAT",
    )
    parser.add_argument(
        "host",
        nargs="?",
        help="name or address of the server; for Modal, name of the Dict in which the server is found (default:"
        " $OPENPI_MODAL_DICT, or openpi-flash)",
    )
    parser.add_argument("--port", type=int, help="default: 8000 for ws, 50051 for grpc, 5555 for quic")
    parser.add_argument(
        "--robot", choices=tuple(ROBOTS), default="droid", help="observation to send over ws (%(default)s)"
    )
    parser.add_argument("--prompt", default="pick up the red cup")
    parser.add_argument("--token", help="bearer token, where the server asks for one")
    parser.add_argument("--ca-file", help="PEM file of the CA of the server's certificate; turns TLS on")
    parser.add_argument("--fingerprint", help="of the server's certificate, as the server logs it, for quic")
    parser.add_argument(
        "--insecure-skip-verify", action="store_true", help="trust any certificate over quic: protects from nobody"
    )
    parser.add_argument("--insecure-plaintext", action="store_true", help="allow grpc without TLS to another machine")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="most seconds for one call (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    time_calls = {
        "ws": _time_websocket,
        "grpc": _time_grpc,
        "quic": _time_quic,
        "modal-tunnel": _time_modal_tunnel,
        "modal-quic": _time_modal_quic,
    }[arguments.transport]
    if arguments.host is None and not arguments.transport.startswith("modal-"):
        raise SettingsError(f"{arguments.transport}: HOST, name or address of the server, is missing")
    calls = time_calls(arguments)
    print_report(f"{arguments.transport}://{arguments.host or modal_host.dict_name()}", calls)
    return 0


def print_report(server: str, calls: Calls, console: Console | None = None) -> None:
    """Prints mean, least and most of each part.

    Args:
        server: title of the table.
        calls: what was measured.
    """
    parts = {
        "client round trip": [call["round_trip_ms"] for call in calls],
        "server": [call["server_ms"] for call in calls],
        "policy (model)": [call["policy_ms"] for call in calls],
        "round trip - server": [call["round_trip_ms"] - call["server_ms"] for call in calls],
        "server - policy": [call["server_ms"] - call["policy_ms"] for call in calls],
    }
    table = Table(title=f"{server}, {len(calls)} calls after 1 warm-up", title_justify="left")
    for heading in ("ms", "mean", "min", "max"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for part, values in parts.items():
        table.add_row(part, *(f"{figure:.2f}" for figure in (statistics.fmean(values), min(values), max(values))))
    (console or Console()).print(table)


def observation_of(specs: Mapping[str, Any], step: int) -> dict[str, Any]:
    """An observation of the named shapes: camera pictures where there are three channels, zeros elsewhere.

    Args:
        specs: nested names → shape.
        step: moment in time, so that no two observations are alike.
    """
    observation: dict[str, Any] = {}
    view = 0
    for name, spec in specs.items():
        if isinstance(spec, Mapping):
            observation[name] = observation_of(spec, step)
        elif len(spec) == 3:
            channels_first = spec[0] == 3
            height, width = spec[1:] if channels_first else spec[:2]
            picture = camera_picture(view, step, height=height, width=width)
            observation[name] = picture.transpose(2, 0, 1) if channels_first else picture
            view += 1
        else:
            observation[name] = np.zeros(spec, np.float32)
    return observation


def _time_calls(infer: Infer, specs: Mapping[str, Any], prompt: str) -> Calls:
    calls = []
    for step in range(1 + TIMED_CALLS):
        observation = observation_of(specs, step) | {"prompt": prompt}
        started = time.perf_counter()
        answer = infer(observation)
        round_trip_ms = (time.perf_counter() - started) * 1e3
        timing = {"server_ms": answer["server_timing"]["infer_ms"], "policy_ms": answer["policy_timing"]["infer_ms"]}
        calls.append({"round_trip_ms": round_trip_ms} | timing)
    return calls[1:]


def _time_websocket(arguments: argparse.Namespace) -> Calls:
    scheme = "wss" if arguments.ca_file else "ws"
    return _time_websocket_at(f"{scheme}://{arguments.host}:{arguments.port or 8000}", arguments)


def _time_websocket_at(url: str, arguments: argparse.Namespace) -> Calls:
    import ssl

    from openpi_flash_client import PolicyError
    from openpi_flash_common import openpi_msgpack
    from websockets.sync.client import connect

    headers = {"Authorization": f"Api-Key {arguments.token}"} if arguments.token else None
    with connect(
        url,
        additional_headers=headers,
        compression=None,
        max_size=None,
        ssl=ssl.create_default_context(cafile=arguments.ca_file) if url.startswith("wss:") else None,
        open_timeout=arguments.timeout,
    ) as connection:
        connection.recv(arguments.timeout)  # the server's metadata come first

        def infer(observation: dict[str, Any]) -> Mapping[str, Any]:
            connection.send(openpi_msgpack.packb(observation))
            answer = connection.recv(arguments.timeout)
            if isinstance(answer, str):
                raise PolicyError(answer)
            return openpi_msgpack.unpackb(answer)

        return _time_calls(infer, ROBOTS[arguments.robot], arguments.prompt)


def _time_grpc(arguments: argparse.Namespace) -> Calls:
    from openpi_flash_client import GrpcPolicy

    return _time_policy(GrpcPolicy, 50051, arguments, insecure_plaintext=arguments.insecure_plaintext)


def _time_quic(arguments: argparse.Namespace) -> Calls:
    try:
        from openpi_flash_client import FlashTransportPolicy
    except ImportError as error:
        raise SettingsError(str(error)) from error
    trust = {"fingerprint": arguments.fingerprint, "insecure_skip_verify": arguments.insecure_skip_verify}
    try:
        return _time_policy(FlashTransportPolicy, 5555, arguments, **trust)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _time_modal_tunnel(arguments: argparse.Namespace) -> Calls:
    store = modal_host.open_dict(arguments.host)
    tunnel = store.get(modal_host.TUNNEL_KEY)
    if tunnel is None:
        raise SettingsError("no tunnel has been published; is deploy/modal/tunnel_app.py running?")
    return _time_websocket_at(tunnel["websocket"], _with(arguments, token=_token(arguments, store)))


def _time_modal_quic(arguments: argparse.Namespace) -> Calls:
    from openpi_flash_client.portal import Portal

    store = modal_host.open_dict(arguments.host)
    with Portal(store, connect_timeout_s=arguments.timeout) as portal:
        Console().print(f"path to the server: {portal.path}")
        there = {"host": "127.0.0.1", "port": portal.port, "fingerprint": portal.fingerprint}
        return _time_quic(_with(arguments, token=_token(arguments, store), **there))


def _token(arguments: argparse.Namespace, store: "Store") -> str | None:
    return arguments.token or store.get(modal_host.TOKEN_KEY)


def _with(arguments: argparse.Namespace, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(**(vars(arguments) | others))


def _time_policy(make: Callable[..., "RemotePolicy"], port: int, arguments: argparse.Namespace, **trust: Any) -> Calls:
    """A policy that says itself what it wants to be sent."""
    timeouts = {"connect_timeout_s": arguments.timeout, "timeout_s": arguments.timeout}
    port = arguments.port or port
    with make(arguments.host, port, ca_file=arguments.ca_file, token=arguments.token, **timeouts, **trust) as policy:
        metadata = policy.get_server_metadata()
        specs: dict[str, Any] = {}
        for spec in metadata["image_specs"]:
            size = (spec["height"], spec["width"])
            specs[spec["path"]] = (3, *size) if spec["layout"].endswith("CHW") else (*size, 3)
        for spec in metadata["tensor_specs"]:
            specs[spec["path"]] = tuple(spec["shape"])
        return _time_calls(policy.infer, specs, arguments.prompt)
