"""EXPERIMENTAL. QUIC to a container through NAT, direct or by a relay: `modal run --detach deploy/modal/quic_app.py`.

Robots find the container through the Modal Dict, as `openpi-flash test modal-quic` does. `.env` may name a relay:
QUIC_RELAY_IP (`:port` may follow), QUIC_RELAY_KEY, and QUIC_RELAY_ONLY=1 for no direct paths.
"""

import modal
import openpi_flash_modal as resources

app = modal.App("openpi-flash-quic", image=resources.image, secrets=resources.secrets)


@app.function(**resources.serving, max_containers=1)
def serve() -> int:
    """Runs the engine until the app is stopped."""
    from openpi_flash_cli.modal_host import serve_quic

    return serve_quic(resources.rendezvous)


@app.local_entrypoint()
def main() -> None:
    """Serves for as long as this command runs; with --detach, until the app is stopped."""
    serve.remote()
