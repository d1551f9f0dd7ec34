"""What a subtask costs: the first token, each further one, and compiling, for several `max_generation_tokens`.

Beside the planner's loop stands the same arithmetic unrolled: a program for each number of tokens, which always runs to
its end. Both are called in turn, in one process, with a random pi0.5 in bfloat16, two 224x224 pictures and a prompt of
32 tokens. First no token may end a subtask, so that the most are written; then one candidate in eight is the end, so
that most subtasks end early.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from openpi_flash_cli.scene import camera_picture
from openpi_flash_models.checkpoints.detect import detect
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig
from openpi_flash_models.planner import decode, decoder
from openpi_flash_models.planner.decoder import Batch, Decoder, load_decoder
from openpi_flash_models.planner.vocabulary import EOS

SIZES = {
    "full": ModelConfig(),
    "small": ModelConfig(
        vision=VisionConfig(width=128, depth=2, mlp_dim=512, num_heads=2),
        vlm=GemmaConfig(width=256, depth=4, mlp_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64),
        expert=GemmaConfig(width=64, depth=4, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=64),
        vocab_size=32_000,
    ),
}
PARTS = ("first token", "each further", "each streamed", "whole")
MOST_TOKENS = (10, 20, 40, 80)
PICTURES = np.stack([camera_picture(i, 0, height=224, width=224) for i in range(2)])
PROMPT_LENGTH = 32
CANDIDATES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="a pi0.5 of the released size; its file takes 7 GB")
    parser.add_argument("--dir", type=Path, help="where to write the checkpoint, and to find that of an earlier run")
    parser.add_argument("--device", help="a JAX platform, e.g. `cpu` (default: JAX's choice)")
    parser.add_argument("--runs", type=int, default=20, help="calls of each kind (%(default)s)")
    parser.add_argument("--most-tokens", type=int, nargs="+", default=MOST_TOKENS)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    size = "full" if arguments.full_size else "small"
    with contextlib.ExitStack() as stack:
        directory = arguments.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="opf-")))
        loaded = load(directory / size, SIZES[size], arguments.device)
    print(f"{size} pi0.5 in bfloat16 on {loaded.device.device_kind}; {arguments.runs} runs; p50 / p95 in ms")
    figures = {
        "size": size,
        "device": loaded.device.device_kind,
        "runs": arguments.runs,
        "most_tokens": measure_most_tokens(loaded, arguments.most_tokens, arguments.runs),
        "ends_early": measure_early_ends(loaded, max(arguments.most_tokens), arguments.runs),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def load(path: Path, config: ModelConfig, device: str | None) -> Decoder:
    """A decoder that never ends a subtask by itself."""
    if not path.exists():
        make_checkpoint(path, config)
    never_ends = np.arange(config.vocab_size) != EOS
    with contextlib.closing(detect(path).open()) as source:
        return load_decoder(config, source, never_ends, device=device, precision="bfloat16")


def measure_most_tokens(loaded: Decoder, most_tokens: list[int], runs: int) -> list[dict[str, Any]]:
    rows = []
    print(f"{'most tokens':>11} {'':8}" + "".join(f"{name:>20}" for name in (*PARTS, "compiling s")))
    for most in most_tokens:
        batch, unrolled = make_batch(most), Unrolled(loaded, most)
        jax.clear_caches()
        compiling = {"loop": compile_s(lambda b=batch: write(loaded, b)), "unrolled": compile_s(lambda u=unrolled: u())}
        parts = []
        for _ in range(runs):
            first, whole = timed_write(loaded, batch)
            streamed = timed_stream(loaded, batch)
            parts.append([first, (whole - first) / (most - 1), streamed, whole, timed(unrolled)])
        *loop, whole_unrolled = (percentiles(of) for of in np.array(parts).T)
        for arm, measured in (("loop", loop), ("unrolled", [None, None, None, whole_unrolled])):
            columns = "".join(f"{shown(of):>20}" for of in measured)
            print(f"{most:11} {arm:8}{columns}{compiling[arm]:20.2f}", flush=True)
            row = {"most_tokens": most, "arm": arm, "compile_s": compiling[arm]}
            rows.append(row | dict(zip(PARTS, measured, strict=True)))
    jax.clear_caches()
    for most in most_tokens:
        write(loaded, make_batch(most))
    compiled = decoder._start._cache_size() + decoder._advance._cache_size()
    print(f"programs compiled for all of these: loop {compiled}, unrolled {len(most_tokens)}")
    return rows


def measure_early_ends(loaded: Decoder, most: int, runs: int) -> list[dict[str, float]]:
    """Sampled subtasks, which end where chance has it; the fastest of five calls for each."""
    allowed = np.zeros(loaded.config.vocab_size, bool)
    allowed[EOS : EOS + CANDIDATES] = True
    ending = Decoder(loaded.config, loaded.weights, loaded.device, allowed)
    rows = []
    for seed in range(runs):
        batch = make_batch(most, temperature=10, seed=seed)
        num_tokens = write(ending, batch)
        rows.append({"tokens": num_tokens, "ms": min(timed_write(ending, batch)[1] for _ in range(5))})
    rows.sort(key=lambda row: row["tokens"])
    tokens, ms = (np.array([row[name] for row in rows]) for name in ("tokens", "ms"))
    if len(np.unique(tokens)) < 2:
        return rows
    slope, start = np.polyfit(tokens - 1, ms, 1)
    off = np.abs(start + slope * (tokens - 1) - ms).max()
    print(f"at most {most} tokens: {len(rows)} sampled subtasks ended after {tokens[0]} to {tokens[-1]}. They took")
    print(f"{start:.2f} ms, and {slope:.2f} for each token after the first; the farthest from that line: {off:.2f} ms")
    return rows


class Unrolled:
    """The planner's arithmetic as one program of so many steps."""

    def __init__(self, loaded: Decoder, most: int) -> None:
        self._loaded, self._batch = loaded, make_batch(most)

        def run(weights, inputs, sampling, allowed):
            prefix, written = decode.start(loaded.config, weights, inputs, sampling, allowed)
            for _ in range(most - 1):
                hidden, caches = decode.forward(loaded.config, weights, prefix, written)
                written = written._replace(logits=decode.tied_logits(weights, hidden), caches=caches)
                written = decode.write(written, sampling, allowed)
            return written.tokens

        self._run = jax.jit(run)

    def __call__(self) -> None:
        images, tokens, token_mask, *choosing = jax.device_put(tuple(self._batch), self._loaded.device)
        inputs, sampling = decode.Inputs(images, tokens, token_mask), decode.Sampling(*choosing)
        with jax.default_matmul_precision("highest"):
            np.asarray(self._run(self._loaded.weights, inputs, sampling, self._loaded.allowed))


def make_batch(most: int, *, temperature: float = 0.0, seed: int = 0) -> Batch:
    return Batch(
        images=PICTURES[None],
        tokens=np.arange(100, 100 + PROMPT_LENGTH, dtype=np.int32)[None],
        token_mask=np.ones((1, PROMPT_LENGTH), bool),
        max_tokens=np.array([most], np.int32),
        temperature=np.array([temperature], np.float32),
        top_k=np.zeros(1, np.int32),
        seeds=np.array([[0, seed]], np.uint32),
    )


def write(loaded: Decoder, batch: Batch) -> int:
    return len(loaded.advance(loaded.start(batch)).token_ids()[0])


def timed_write(loaded: Decoder, batch: Batch) -> tuple[float, float]:
    """Time until the first token is there, and until all are, in ms."""
    started = time.perf_counter()
    draft = loaded.start(batch)
    draft.token_ids()
    first = time.perf_counter()
    loaded.advance(draft).token_ids()
    return (first - started) * 1e3, (time.perf_counter() - started) * 1e3


def timed_stream(loaded: Decoder, batch: Batch) -> float:
    """Time from one token to the next where each is handed out as it is written, in ms."""
    draft = loaded.start(batch)
    num_tokens = len(draft.token_ids()[0])
    started = time.perf_counter()
    while not draft.is_done:
        draft = loaded.advance(draft, until=num_tokens + 1)
        num_tokens = len(draft.token_ids()[0])
    return (time.perf_counter() - started) * 1e3 / (num_tokens - 1)


def compile_s(call: Callable[[], object]) -> float:
    """What a first call takes beyond a second."""
    first = timed(call)
    return (first - timed(call)) / 1e3


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def percentiles(of: list[float] | np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(of, (50, 95))]


def shown(of: list[float] | None) -> str:
    return "" if of is None else f"{of[0]:.2f} / {of[1]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
