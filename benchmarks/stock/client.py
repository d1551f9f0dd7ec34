"""Times openpi's own client. Runs in an environment of its own, where only openpi-client is installed.

Reads numbers of calls, one a line; answers each with a line of JSON: [round trip, model] in ms for every call.
"""

import json
import sys
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
observation = {**np.load(sys.argv[2]), "prompt": sys.argv[3]}
for line in sys.stdin:
    calls = []
    for _ in range(int(line)):
        started = time.perf_counter()
        answer = policy.infer(observation)
        calls.append([(time.perf_counter() - started) * 1e3, answer["policy_timing"]["infer_ms"]])
    print(json.dumps(calls), flush=True)
