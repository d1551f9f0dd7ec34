"""The action service as a whole: from its settings to a server, and a policy that is loaded and warm."""

import logging
import time
from pathlib import Path

from openpi_flash_common.model_server import serve_model, warm_up
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.settings import ActionSettings, EngineSettings, SettingsError
from openpi_flash_common.telemetry import setup
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy import Policy
from openpi_flash_models.policy_configs import load_policy_config

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
    servicer = ActionServicer(Scheduler(action.queue_size, telemetry), telemetry)
    await serve_model(SERVICE, servicer, action, telemetry, lambda: load(settings, action))


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
        prefix_precision=action.prefix_precision,
        compile_mode=settings.pytorch_compile_mode,
        num_steps=action.num_steps,
        default_prompt=action.default_prompt,
        max_batch_size=action.max_batch_size,
        real_time_chunking=action.real_time_chunking,
        compilation_cache=settings.jax_compilation_cache_dir,
        data_home=settings.data_home,
    )
    logger.info(
        "policy loaded",
        extra={
            "config": config.name,
            "backend": policy.backend.name,
            "load_s": round(time.monotonic() - started, 2),
        },
    )
    warm_up(policy.warm_up, policy.warm_up_shapes(), action.warm_up, "action")
    return policy
