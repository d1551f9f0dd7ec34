"""Makes random checkpoints of any size in either layout, and a tiny tokenizer: for the demo, tests and benchmarks."""

import dataclasses
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece

from openpi_flash_models.checkpoints.convert import Precision, describe
from openpi_flash_models.checkpoints.layout import JAX_EMBEDDING, TORCH_EMBEDDING, jax_shapes, torch_shapes
from openpi_flash_models.checkpoints.safetensors_source import FILE_NAME
from openpi_flash_models.checkpoints.write import replacing, write_jax_params, write_safetensors
from openpi_flash_models.config import ModelConfig

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def make_checkpoint(
    directory: Path,
    config: ModelConfig,
    *,
    layout: str = "jax",
    dtype: str = "bfloat16",
    seed: int = 0,
    asset_ids: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Writes random weights, scaled so that actions are of order 1, and normalisation statistics.

    The files appear only when they are whole. Memory stays at a few blocks of `write.BLOCK_BYTES`, whatever the size.
    The two layouts of one seed are different models.

    Args:
        directory: must not exist, or be empty.
        layout: `jax` (Orbax `params/`) or `torch` (`model.safetensors` and `config.json`).
        dtype: `bfloat16` or `float32`.
        asset_ids: id of each robot's statistics, to its numbers of state and action dimensions.

    Raises:
        CheckpointError: `directory` holds something.
    """
    shapes = jax_shapes(config) if layout == "jax" else torch_shapes(config)
    tensors = {
        name: _RandomTensor(shape, DTYPES[dtype], *distribution(name, shape), seed=(seed, zlib.crc32(name.encode())))
        for name, shape in shapes.items()
    }
    with replacing(directory) as partial:
        if layout == "jax":
            write_jax_params(partial / "params", tensors.items())
        else:
            header = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            write_safetensors(partial / FILE_NAME, header, tensors.items())
            (partial / "config.json").write_text(json.dumps(describe(config, Precision(dtype)), indent=2) + "\n")
        for asset_id, dims in (asset_ids or {}).items():
            stats = partial / "assets" / asset_id / "norm_stats.json"
            stats.parent.mkdir(parents=True)
            stats.write_text(json.dumps(_norm_stats(dims, seed), indent=2) + "\n")


def train_tiny_tokenizer(path: Path, vocab_size: int = 512) -> None:
    """Trains a sentencepiece model with PaliGemma's settings on made-up sentences.

    pad, eos, bos and unk are 0 to 3; digits are split; unknown characters become bytes; nothing is normalised or put in
    front; a newline and runs of spaces have pieces of their own.

    Args:
        vocab_size: 320 (256 of them are bytes) to 680, which is all that the sentences have.
    """
    if not 320 <= vocab_size <= 680:
        raise ValueError(f"vocab_size: {vocab_size}, expected 320 to 680")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\n\n", "▁▁", "▁▁▁▁"],
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


@dataclasses.dataclass(frozen=True)
class _RandomTensor:
    """Normal numbers that are made as they are written: each band of rows from a generator of its own."""

    shape: tuple[int, ...]
    dtype: np.dtype
    mean: float
    std: float
    seed: tuple[int, int]

    def __getitem__(self, rows: slice) -> np.ndarray:
        rng = np.random.default_rng((*self.seed, rows.start))
        block = np.empty((rows.stop - rows.start, *self.shape[1:]), self.dtype)
        flat = block.reshape(-1)
        for start in range(0, flat.size, 1 << 20):  # float32 takes twice the memory of a block of bfloat16
            part = flat[start : start + (1 << 20)]
            part[:] = rng.standard_normal(part.size, np.float32) * np.float32(self.std) + np.float32(self.mean)
        return block


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation: 1/√(fan in) for matrices, so that every layer keeps the size of what it is given."""
    if name in (TORCH_EMBEDDING, JAX_EMBEDDING):
        return 0.0, shape[-1] ** -0.5  # the model multiplies by √width
    if name.endswith(("pos_embedding", "position_embedding.weight", "bias")):
        return 0.0, 0.02
    if re.search(r"(LayerNorm_\d|encoder_norm)/scale|vision_model\..*layer_?norm\d?\.weight", name):
        return 1.0, 0.1
    if re.search(r"norm(_1)?/scale|norm\.weight", name):
        return 0.0, 0.1  # stored as an offset from one
    return 0.0, _fan_in(name, shape) ** -0.5


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    if name.endswith(".weight"):
        return math.prod(shape[1:])
    if name.endswith("embedding/kernel"):  # a convolution's (size, size, 3, width)
        return math.prod(shape[:-1])
    if re.search(r"attn_vec_einsum|Attention_0/out/", name):  # (layers, heads, head_dim, width)
        return math.prod(shape[1:-1])
    if re.search(r"Attention_0/(query|key|value)/", name):  # (layers, width, heads, head_dim)
        return shape[1]
    return shape[-2]


def _norm_stats(dims: tuple[int, int], seed: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    rng = np.random.default_rng(seed)
    stats = {}
    for key, size in zip(("state", "actions"), dims, strict=True):
        mean, std = rng.uniform(-0.3, 0.3, size), rng.uniform(0.2, 0.8, size)
        values = {"mean": mean, "std": std, "q01": mean - 2.3 * std, "q99": mean + 2.3 * std}
        stats[key] = {name: value.tolist() for name, value in values.items()}
    return {"norm_stats": stats}


def _sentences() -> Iterator[str]:
    verbs = (
        "pick up",
        "put down",
        "push",
        "open",
        "close",
        "fold",
        "wipe",
        "pour",
        "stack",
        "hand over",
        "turn",
        "move",
    )
    colours = ("red", "blue", "green", "yellow", "small", "large", "wooden", "empty")
    things = ("cup", "plate", "towel", "drawer", "block", "spoon", "bottle", "bowl", "sponge", "box", "lid", "marker")
    places = ("on the table", "next to the mug", "into the bin", "in the sink", "behind the pot", "to the left arm")
    for i, (verb, colour, thing, place) in enumerate(itertools.product(verbs, colours, things, places)):
        bins = " ".join(str((i * 37 + j * 61) % 256) for j in range(8))
        yield f"Task: {verb} the {colour} {thing} {place}, State: {bins};\nAction: "
        yield f"{verb.capitalize()} the {thing}. Subtask: "
