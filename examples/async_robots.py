"""Several robots in one event loop, over QUIC: no thread waits, and a robot that no longer needs its answer cancels it.

    python examples/async_robots.py HOST PORT FINGERPRINT

The server logs its certificate's fingerprint when it starts. The pictures here are grey and as large as a camera's: the
client scales and codes them as the server asks.
"""

import asyncio
import sys
import time

import numpy as np
from openpi_flash_client import FlashTransportPolicy

ROBOTS, STEPS = 3, 5


async def main(host: str, port: int, fingerprint: str) -> None:
    with FlashTransportPolicy(host, port, fingerprint=fingerprint) as policy:
        observation = observe(policy.get_server_metadata())
        await asyncio.gather(*(drive(policy, robot, observation) for robot in range(ROBOTS)))
        unneeded = asyncio.create_task(policy.infer_async(observation))
        await asyncio.sleep(0)
        unneeded.cancel()  # the server drops the work, too
        await asyncio.wait([unneeded])
        print(f"cancelled: {unneeded.cancelled()}")


async def drive(policy: FlashTransportPolicy, robot: int, observation: dict) -> None:
    for step in range(STEPS):
        started = time.monotonic()
        answer = await policy.infer_async(observation | {"prompt": f"pick up cup {robot}"}, timeout_s=10)
        took_ms = (time.monotonic() - started) * 1e3
        print(f"robot {robot}, step {step}: {len(answer['actions'])} actions in {took_ms:.1f} ms")


def observe(metadata: dict) -> dict[str, np.ndarray]:
    """What the server's metadata ask for."""
    pictures = {}
    for spec in metadata["image_specs"]:
        picture = np.full((480, 640, 3), 128, np.uint8)
        pictures[spec["path"]] = picture.transpose(2, 0, 1) if spec["layout"].endswith("CHW") else picture
    return pictures | {spec["path"]: np.zeros(spec["shape"]) for spec in metadata["tensor_specs"]}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
