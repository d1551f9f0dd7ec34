"""WebSocket and gRPC through direct TCP tunnels: `modal run --detach deploy/modal/tunnel_app.py`.

Where the tunnels lead to is published in the Modal Dict; `openpi-flash test modal-tunnel` finds it there.
"""

import modal
import openpi_flash_modal as resources

app = modal.App("openpi-flash-tunnel", image=resources.image, secrets=resources.secrets)


@app.function(**resources.serving, max_containers=1)
def serve() -> int:
    """Runs the engine until the app is stopped."""
    from openpi_flash_cli.modal_host import serve_tunnel

    return serve_tunnel(resources.rendezvous, modal.forward)


@app.local_entrypoint()
def main() -> None:
    """Serves for as long as this command runs; with --detach, until the app is stopped."""
    serve.remote()
