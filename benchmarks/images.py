"""What each encoding of camera pictures costs and changes: bytes, time, noise, and the actions of a tiny pi0.5.

Three photographs at 480x640 are prepared for a 224x224 model by the robot's code (`flash-transport/crates/image`), one
core, and by Pillow in the same run, then decoded by the server's code. Raw and PNG are checked to be the very bytes
that the model's own preprocessing makes.

    uv run --no-project --with scikit-image python benchmarks/images.py

The noise column (PSNR) leaves the black padding out. The model's weights are random: its action differences rank the
encodings, next to those of the same pictures at other cameras; they say nothing of a trained policy.
"""

import argparse
import io
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from openpi_flash.v1 import types_pb2
from openpi_flash_cli.tiny import make_tiny_policy
from openpi_flash_common.codec import image_from_proto
from openpi_flash_models.images import resize_with_pad
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config
from PIL import Image
from skimage import data

CRATE = Path(__file__).parent.parent / "flash-transport/crates/image"
CAMERAS = ("top", "left", "right")
HEIGHT, WIDTH, SIZE = 480, 640, 224
INSIDE = slice((SIZE - SIZE * HEIGHT // WIDTH) // 2, (SIZE + SIZE * HEIGHT // WIDTH) // 2)
"""Rows of the model's picture that are not padding."""
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
ENCODINGS = [("raw",), ("png",), *((str(quality), sub) for quality in (80, 90, 95) for sub in SUBSAMPLINGS)]
WIRE = {"raw": types_pb2.IMAGE_ENCODING_RAW, "png": types_pb2.IMAGE_ENCODING_PNG}
REPEATS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensor-noise", type=float, default=0, help="in grey levels (%(default)s)")
    arguments = parser.parse_args()
    pictures = photographs(arguments.sensor_noise)
    actions = tiny_policy()
    binary = build()

    reference = {name: resize_with_pad(picture, SIZE, SIZE) for name, picture in pictures.items()}
    exact = actions(reference)
    exchanged = dict(zip(CAMERAS, np.roll([*reference.values()], 1, axis=0), strict=True))
    others = np.abs(actions(exchanged) - exact)
    print("encoding     bytes of 3  prepare ms  Pillow ms  decode ms  PSNR dB (least)   action difference, mean  max")
    for encoding in ENCODINGS:
        coded, prepare_ms = zip(*(prepare(binary, picture, encoding) for picture in pictures.values()), strict=True)
        pillow_ms = [median_ms(pillow_prepare, picture, encoding) for picture in pictures.values()]
        images = [
            types_pb2.Image(
                encoding=WIRE.get(encoding[0], types_pb2.IMAGE_ENCODING_JPEG), height=SIZE, width=SIZE, data=view
            )
            for view in coded
        ]
        decode_ms = [median_ms(image_from_proto, image, "camera") for image in images]
        views = {name: image_from_proto(image, name) for name, image in zip(CAMERAS, images, strict=True)}
        psnrs = [psnr(views[name][INSIDE], reference[name][INSIDE]) for name in CAMERAS]
        if encoding[0] in WIRE and min(psnrs) < np.inf:
            raise SystemExit(f"{encoding[0]} is not what the model's own preprocessing makes")
        difference = np.abs(actions(views) - exact)
        print(
            f"{' '.join(encoding):12} {sum(map(len, coded)):10} {np.mean(prepare_ms):11.2f} {np.mean(pillow_ms):10.2f}"
            f" {np.mean(decode_ms):10.2f} {np.mean(psnrs):8.1f} ({min(psnrs):.1f})"
            f" {difference.mean():25.5f} {difference.max():.5f}"
        )
    print(f"{'exchanged':67} {others.mean():25.5f} {others.max():.5f}")


def photographs(sensor_noise: float) -> dict[str, np.ndarray]:
    """One (480, 640, 3) uint8 photograph for each camera."""
    rng = np.random.default_rng(0)
    pictures = {}
    for name, photograph in zip(CAMERAS, (data.astronaut(), data.coffee(), data.chelsea()), strict=True):
        picture = Image.fromarray(photograph)
        scale = min(picture.width / WIDTH, picture.height / HEIGHT)
        left, top = (picture.width - scale * WIDTH) / 2, (picture.height - scale * HEIGHT) / 2
        box = (left, top, left + scale * WIDTH, top + scale * HEIGHT)
        pixels = np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box))
        pictures[name] = np.clip(pixels + rng.normal(0, sensor_noise, pixels.shape) + 0.5, 0, 255).astype(np.uint8)
    return pictures


def tiny_policy() -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A function from pictures to actions; noise, state and prompt stay the same."""
    with tempfile.TemporaryDirectory(prefix="opf-") as directory:
        tiny = make_tiny_policy(Path(directory), robot="three_cameras", layout="torch")
        config = load_policy_config(tiny.policy_file)
        policy = load_policy(config, tiny.checkpoint_dir, device="cpu", precision="float32")
    noise = np.random.default_rng(0).standard_normal((config.model.action_horizon, config.model.action_dim))
    state = np.linspace(-0.5, 0.5, 8)

    def actions(pictures: dict[str, np.ndarray]) -> np.ndarray:
        observation = {**pictures, "state": state, "prompt": "pick up the cup"}
        return policy.infer(observation, noise=noise.astype(np.float32))["actions"]

    return actions


def build() -> Path:
    """The robot's code as a program; see its first lines."""
    command = ["cargo", "build", "--release", "--example", "prepare", "--message-format=short"]
    subprocess.run(command, cwd=CRATE, check=True)
    metadata = subprocess.run(["cargo", "metadata", "--no-deps"], cwd=CRATE, check=True, capture_output=True)
    return Path(json.loads(metadata.stdout)["target_directory"]) / "release/examples/prepare"


def prepare(binary: Path, picture: np.ndarray, encoding: tuple[str, ...]) -> tuple[bytes, float]:
    """The coded picture and the median time in ms."""
    command = [binary, *map(str, picture.shape[:2]), str(SIZE), *encoding]
    done = subprocess.run(command, input=picture.tobytes(), capture_output=True, check=True)
    return done.stdout, float(done.stderr)


def pillow_prepare(picture: np.ndarray, encoding: tuple[str, ...]) -> None:
    resized = resize_with_pad(picture, SIZE, SIZE)
    match encoding:
        case ["png"]:
            Image.fromarray(resized).save(io.BytesIO(), "PNG", compress_level=1)
        case [quality, subsampling]:
            Image.fromarray(resized).save(io.BytesIO(), "JPEG", quality=int(quality), subsampling=subsampling)


def median_ms(work: Callable[..., object], *arguments: object) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    square = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / square)) if square else np.inf


if __name__ == "__main__":
    main()
