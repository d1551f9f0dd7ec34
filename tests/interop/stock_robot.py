"""A robot with the stock openpi-client, run in an environment that has nothing of openpi-flash.

    python stock_robot.py ROLE HOST PORT OBSERVATION.npz CALLS

Says `ready` when connected, waits for a line on standard input, plays its role, and prints one JSON object.
"""

import json
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

OBSERVATION = {name: value if value.ndim else value.item() for name, value in np.load(sys.argv[4]).items()}


def policy(policy, calls):
    """Plain calls, all with the same noise."""
    results = [policy.infer(OBSERVATION) for _ in range(calls)]
    return {
        "metadata": policy.get_server_metadata(),
        "actions": [result["actions"].tobytes().hex() for result in results],
        "dtype": str(results[0]["actions"].dtype),
        "keys": [{key: list(value) for key, value in r.items() if key != "actions"} for r in results],
    }


def broker(policy, calls):
    """Row after row of each chunk, for `calls` chunks."""
    horizon = len(policy.infer(OBSERVATION)["actions"])
    robot = ActionChunkBroker(policy, horizon)
    rows = [robot.infer(OBSERVATION)["actions"] for _ in range(calls * horizon)]
    robot.reset()
    return {"actions": [np.stack(rows[i : i + horizon]).tobytes().hex() for i in range(0, len(rows), horizon)]}


def bad_prompt(policy, calls):
    """A request that is refused, on a connection of its own."""
    try:
        policy.infer({**OBSERVATION, "prompt": 5})
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def requests(policy, calls):
    """One call for each change to the observation in the list of them that the file beside OBSERVATION holds."""
    changes = json.loads(Path(sys.argv[4]).with_suffix(".json").read_text())
    return {"answers": [plain(policy.infer({**OBSERVATION, **change})) for change in changes]}


def steady(policy, calls):
    """One call after the other until told to stop; each answer is printed at once."""
    count, stop = 0, told_to_stop()
    while not stop.is_set():
        print(json.dumps(plain(policy.infer(OBSERVATION))), flush=True)
        count += 1
    return {"calls": count}


def plain(answer):
    """An answer for JSON, with the shape of the actions in their place."""
    return {key: list(value.shape) if key == "actions" else value for key, value in answer.items()}


def garbage(policy, calls):
    """Bytes that mean nothing, on one connection after the other, until told to stop."""
    sent, stop = 0, told_to_stop()
    while not stop.is_set():
        policy._ws.send(b"\xc1" * (sent % 4096))
        assert isinstance(policy._ws.recv(), str)
        policy = WebsocketClientPolicy(sys.argv[2], int(sys.argv[3]))
        sent += 1
    return {"sent": sent}


def deaf(policy, calls):
    """Requests without ever reading a reply, until told to stop or cut off."""
    message = policy._packer.pack(OBSERVATION)
    connection, stop, sent = policy._ws.socket, told_to_stop(), 0
    threading.Thread(target=lambda: (stop.wait(), shut(connection)), daemon=True).start()
    try:
        while not stop.is_set():
            policy._ws.send(message)
            sent += 1
    except Exception:
        stop.wait()
    return {"sent": sent}


def vanish(policy, calls):
    """Gone without a word while a request is in flight, again and again until told to stop."""
    message, stop, gone = policy._packer.pack(OBSERVATION), told_to_stop(), 0
    while not stop.is_set():
        policy._ws.send(message)
        time.sleep(0.002)
        shut(policy._ws.socket)
        policy = WebsocketClientPolicy(sys.argv[2], int(sys.argv[3]))
        gone += 1
    return {"gone": gone}


def told_to_stop():
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    return stop


def shut(connection):
    """Resets the connection, as a crash or a pulled cable in the end does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    role, host, port, _, calls = sys.argv[1:]
    connected = WebsocketClientPolicy(host, int(port))
    print("ready", flush=True)
    sys.stdin.readline()
    roles = {f.__name__: f for f in (policy, broker, bad_prompt, requests, steady, garbage, deaf, vanish)}
    print(json.dumps(roles[role](connected, int(calls))))
