"""What of the Python client is Rust; see openpi_flash_client."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Literal, final

import numpy as np

Picture = tuple[str, np.ndarray, bool, Camera]
"""Name, C-contiguous array, whether its axes are (channel, height, width), and what it becomes."""

Method = Literal["Infer", "Reset", "GetMetadata"]

class TransportError(Exception):
    """There is no answer."""

    args: tuple[int, str, str]
    """gRPC status number; message, empty where the call's own time ran out; offending field or an empty string."""

class PictureError(Exception):
    """A picture cannot be prepared."""

    args: tuple[str, str]
    """Its name, and why."""

@final
class Camera:
    """What the server wants of one camera."""

    def __init__(
        self,
        height: int,
        width: int,
        encoding: Literal["lossless", "raw", "png", "jpeg"] | str,
        quality: int = 0,
        subsampling: str = "",
    ) -> None:
        """`lossless` is raw or PNG: a client chooses what its link carries sooner; `prepare` makes it raw.

        Raises ValueError for an encoding or subsampling that is not known."""

def prepare(pictures: Sequence[Picture]) -> bytes:
    """Serialized InferRequest fields that hold the pictures, each as its camera wants it.

    Pictures are uint8, or floats in [0, 1].

    Raises:
        PictureError: a picture that cannot be prepared.
    """

@final
class Client:
    """A QUIC client that keeps its connection in a thread of its own. May be used by several threads at once."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        server_name: str | None = None,
        ca_file: str | PathLike[str] | None = None,
        fingerprint: str | None = None,
        insecure_skip_verify: bool = False,
        client_cert_file: str | PathLike[str] | None = None,
        client_key_file: str | PathLike[str] | None = None,
        token: str | None = None,
    ) -> None:
        """Begins to connect, and waits for nothing.

        Raises:
            ValueError: options that contradict each other, or a file that cannot be used.
        """

    @property
    def num_lost(self) -> int:
        """Connections that were lost so far: after each the server may be another."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""

    def call(
        self, method: Method, head: bytes, pictures: Sequence[Picture], *, timeout_s: float, traceparent: str = ""
    ) -> bytes:
        """Sends `head` and the pictures after it, and waits for the serialized answer.

        The interpreter's lock is free meanwhile, and signals are handled.

        Raises:
            PictureError: a picture that cannot be prepared.
            TransportError: there is no answer.
        """

    def start(
        self,
        method: Method,
        head: bytes,
        pictures: Sequence[Picture],
        done: Callable[[bytes | None, Exception | None], object],
        *,
        timeout_s: float,
        traceparent: str = "",
    ) -> Call:
        """Begins a call and returns at once. `done(answer, error)` is called in another thread when it has ended."""

    def close(self) -> None:
        """Ends the connection and every call."""

@final
class Call:
    """A call that has been begun."""

    def cancel(self) -> None:
        """Ends it; the server drops the work."""
