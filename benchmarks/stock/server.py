"""openpi's arrangement, as a rival: a `websockets` server that calls the policy in its own process and event loop."""

import asyncio
import logging
import sys
import time
from pathlib import Path

from openpi_flash_common import openpi_msgpack
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config
from websockets.asyncio.server import ServerConnection, serve


async def main(policy_file: str, checkpoint_dir: str, host: str, port: int, num_steps: int) -> None:
    config = load_policy_config(policy_file)
    policy = load_policy(config, Path(checkpoint_dir), device="cpu", precision="float32", num_steps=num_steps)
    policy.warm_up()

    async def converse(connection: ServerConnection) -> None:
        await connection.send(openpi_msgpack.packb(dict(policy.metadata)))
        async for message in connection:
            started = time.perf_counter()
            observation = openpi_msgpack.unpackb(message)
            prepared = policy.prepare(observation, prompt=observation.pop("prompt"))
            model_started = time.perf_counter()
            actions = policy.run([prepared])[0]
            model_ms = (time.perf_counter() - model_started) * 1e3
            result = {**policy.finish(prepared, actions), "policy_timing": {"infer_ms": model_ms}}
            result["server_timing"] = {"infer_ms": (time.perf_counter() - started) * 1e3}
            await connection.send(openpi_msgpack.packb(result))

    async with serve(converse, host, port, compression=None, max_size=None):
        print("ready", flush=True)
        await asyncio.Future()


if __name__ == "__main__":
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # clients end without a goodbye
    if sys.argv[5] == "instant":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import instant

        instant.install()
    host = sys.argv[6] if len(sys.argv) > 6 else "127.0.0.1"
    asyncio.run(main(sys.argv[1], sys.argv[2], host, int(sys.argv[3]), int(sys.argv[4])))
