"""The planner service as a whole: from its settings to a server, and a planner that is loaded and warm."""

import logging
import time

from openpi_flash_common.model_server import serve_model, warm_up
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.settings import EngineSettings, PlannerSettings, SettingsError
from openpi_flash_common.telemetry import setup
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.planner.config import load_planner_config
from openpi_flash_models.planner.load import load_planner
from openpi_flash_models.planner.planner import Planner

from openpi_flash_planner.configuration import Configuration
from openpi_flash_planner.service import SERVICE, PlannerServicer

logger = logging.getLogger(__name__)


async def serve(settings: EngineSettings) -> None:
    """Runs until SIGTERM.

    Raises:
        SettingsError: there is no planner section, or the settings cannot be used.
        ModelsError: configuration or checkpoint cannot be used.
        AcceleratorLostError: only a new process can help.
    """
    planner = settings.planner
    if planner is None:
        raise SettingsError("planner: required by the planner service, but not set")
    telemetry = setup(settings.telemetry, "planner")
    servicer = PlannerServicer(Scheduler(planner.queue_size, telemetry), Configuration(planner))
    await serve_model(SERVICE, servicer, planner, telemetry, lambda: load(settings, planner))


def load(settings: EngineSettings, planner: PlannerSettings) -> Planner:
    """Loads the planner and calls it once in each shape that is to be warm. Takes seconds to minutes."""
    started = time.monotonic()
    config = load_planner_config(planner.model_config_name)
    loaded = load_planner(
        config,
        resolve(planner.checkpoint_dir, data_home=settings.data_home),
        device=None if planner.device == "auto" else planner.device,
        precision=planner.precision,
        default_prompt=planner.default_prompt,
        max_batch_size=planner.max_batch_size,
        compilation_cache=settings.jax_compilation_cache_dir,
        data_home=settings.data_home,
    )
    logger.info("planner loaded", extra={"config": config.name, "load_s": round(time.monotonic() - started, 2)})
    warm_up(loaded.warm_up, loaded.warm_up_shapes(), planner.warm_up, "planner")
    return loaded
