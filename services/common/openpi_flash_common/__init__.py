"""What the services share."""

import os

# gRPC waits for sockets in threads of its own, which hand what arrives to asyncio's: twelve changes of threads for a
# message and its answer. In the way it did before, they are four. It reads this once, when it is imported.
os.environ.setdefault(
    "GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints"
)
