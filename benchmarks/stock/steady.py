"""openpi's own client, one call after the other until it is ended. Runs in an environment where only it is installed.

    python steady.py PORT OBSERVATION.npz PROMPT

Each event is told as a line of JSON: ["answer" | "failure" | "new client", moment of time.monotonic]. The client does
not connect again by itself: when its connection has gone, a new one takes its place.
"""

import json
import sys
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

PAUSE_S = 0.02


def tell(event: str) -> None:
    print(json.dumps([event, time.monotonic()]), flush=True)


def main() -> None:
    observation = {**np.load(sys.argv[2]), "prompt": sys.argv[3]}
    policy = None
    while True:
        try:
            if policy is None:
                policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
            policy.infer(observation)
            tell("answer")
        except RuntimeError:  # an error that the server sent, on a connection that stays open
            tell("failure")
            time.sleep(PAUSE_S)
        except Exception:
            policy = None
            tell("failure")
            tell("new client")
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
