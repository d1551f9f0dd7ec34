"""A robot's loop with the Python client: a deadline per call, and what to do when there is no answer.

    python examples/control_loop.py HOST [PORT]

The pictures here are grey; a robot puts its cameras' in their place, in the sizes that the server asks for.
"""

import sys
import time

import numpy as np
from openpi_flash_client import GrpcPolicy, PolicyError, PolicyTimeoutError

STEPS, HZ = 20, 10


def main(host: str, port: int = 50051) -> None:
    with GrpcPolicy(host, port, timeout_s=1.0) as policy:
        metadata = policy.get_server_metadata()
        for step in range(STEPS):
            started = time.monotonic()
            observation = observe(metadata)
            try:
                actions = policy.infer(observation | {"prompt": "pick up the red cup"})["actions"]
            except PolicyTimeoutError:
                print(f"step {step}: no answer in time; the robot holds still")
            except PolicyError as error:
                print(f"step {step}: {error.code}: {error}")
            else:
                print(f"step {step}: {actions.shape[0]} actions, the first is {np.round(actions[0], 2)}")
            time.sleep(max(0.0, 1 / HZ - (time.monotonic() - started)))


def observe(metadata: dict) -> dict[str, np.ndarray]:
    """What the server's metadata ask for."""
    observation = {}
    for spec in metadata["image_specs"]:
        picture = np.full((spec["height"], spec["width"], 3), 128, np.uint8)
        observation[spec["path"]] = picture.transpose(2, 0, 1) if spec["layout"].endswith("CHW") else picture
    for spec in metadata["tensor_specs"]:
        observation[spec["path"]] = np.zeros(spec["shape"])
    return observation


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
