"""openpi's WebSocket protocol behind Modal's own HTTPS: `modal deploy deploy/modal/websocket_app.py`.

Modal starts containers as robots come and stops them when they are gone.
"""

from typing import Any

import modal
import openpi_flash_modal as resources

app = modal.App("openpi-flash-websocket", image=resources.image, secrets=resources.secrets)


@app.function(**resources.serving, startup_timeout=30 * 60, scaledown_window=10 * 60)
@modal.concurrent(max_inputs=64)
@modal.asgi_app()
def serve() -> Any:
    """The engine; one for all robots that come to this container."""
    from openpi_flash_cli.asgi import application
    from openpi_flash_cli.modal_host import require_token

    require_token(resources.rendezvous)
    return application()
