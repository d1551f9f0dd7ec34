"""The action service as a whole: listens at once, serves when its policy is loaded and warm."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.settings import ActionSettings, EngineSettings, SettingsError, WarmUpSettings
from openpi_flash_common.telemetry import setup
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy import Policy, WarmUpShape
from openpi_flash_models.policy_configs import load_policy_config

from openpi_flash_action.scheduler import Scheduler
from openpi_flash_action.service import SERVICE, ActionServicer

logger = logging.getLogger(__name__)


async def serve(settings: EngineSettings) -> None:
    """Runs until SIGTERM.

    Raises:
        SettingsError: there is no action section, or the settings cannot be used.
        ModelsError: configuration or checkpoint cannot be used.
        AcceleratorLostError: only a new process can help.
    """
    action = settings.action
    if action is None:
        raise SettingsError("action: required by the action service, but not set")
    telemetry = setup(settings.telemetry, "action")
    scheduler = Scheduler(action.queue_size, telemetry)
    servicer = ActionServicer(scheduler, telemetry)
    server = servicer.server = GrpcServer(
        {SERVICE: servicer.register},
        [f"{action.host}:{action.grpc_port}"],
        telemetry,
        tls=action.tls,
        auth=action.auth,
        max_message_bytes=action.max_message_bytes,
    )
    await server.start()
    running = asyncio.ensure_future(server.run_until_stopped())
    loading = asyncio.ensure_future(scheduler.on_accelerator(lambda: load(settings, action)))
    await asyncio.wait({running, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # stopped during a long compile, which no thread can be talked out of
        logger.info("stopped before the policy was ready")
        os._exit(0)
    try:
        servicer.policy = loading.result()
        # A collection that walks all that a framework made takes over 100 ms; nothing of it is garbage.
        gc.collect()
        gc.freeze()
        await server.set_serving(True)
        await asyncio.wait({running, scheduler.lost}, return_when=asyncio.FIRST_COMPLETED)
        if scheduler.lost.done():
            scheduler.lost.result()
    finally:
        server.stop()
        await running
        scheduler.close()
        telemetry.shutdown()


def load(settings: EngineSettings, action: ActionSettings) -> Policy:
    """Loads the policy and calls it once in each shape that is to be warm. Takes seconds to minutes."""
    started = time.monotonic()
    config = load_policy_config(action.model_config_name)
    checkpoint_dir: Path = resolve(action.checkpoint_dir, data_home=settings.data_home)
    policy = load_policy(
        config,
        checkpoint_dir,
        backend=action.backend,
        device=None if action.device == "auto" else action.device,
        precision=action.precision,
        compile_mode=settings.pytorch_compile_mode,
        num_steps=action.num_steps,
        default_prompt=action.default_prompt,
        max_batch_size=action.max_batch_size,
        data_home=settings.data_home,
    )
    loaded = time.monotonic()
    logger.info(
        "policy loaded",
        extra={"config": config.name, "backend": policy.backend.name, "load_s": round(loaded - started, 2)},
    )
    shapes = select_shapes(policy, action.warm_up)
    policy.warm_up(shapes, _log_warm_up)
    logger.info("warm", extra={"shapes": len(shapes), "warm_up_s": round(time.monotonic() - loaded, 2)})
    return policy


def select_shapes(policy: Policy, warm_up: WarmUpSettings) -> list[WarmUpShape]:
    """The shapes to warm up.

    Raises:
        SettingsError: a size that this policy never runs.
    """
    chosen = {}
    for name, wanted, possible in (
        ("batch_sizes", warm_up.batch_sizes, policy.batch_sizes),
        ("prompt_buckets", warm_up.prompt_buckets, policy.prompt_buckets),
    ):
        unknown = sorted(set(wanted or ()) - set(possible))
        if unknown:
            raise SettingsError(f"action.warm_up.{name}: {_join(unknown)} cannot occur; {_join(possible)} can")
        chosen[name] = possible if wanted is None else wanted
    return [
        shape
        for shape in policy.warm_up_shapes()
        if shape.batch_size in chosen["batch_sizes"] and shape.prompt_bucket in chosen["prompt_buckets"]
    ]


def _log_warm_up(done: int, total: int, shape: WarmUpShape) -> None:
    logger.info("warming up", extra={"done": done, "of": total, **shape._asdict()})


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
