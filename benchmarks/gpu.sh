#!/usr/bin/env bash
# What only a GPU can show of the model, in one command of less than ten minutes: the tests that need one, each operation
# alone, then `openpi-flash bench model` at full size. Results go to OUT (build/gpu). Arguments go to the benchmark.
#
# Where nothing can be installed: PYTHON=python3 runs from the source tree with what that Python has (PyTorch, JAX, numpy,
# ml_dtypes, tensorstore, safetensors, sentencepiece, pillow, rich, tqdm, pytest), and wheels of what it lacks are
# unpacked from .whl, made before by `pip download --no-deps -d .whl …`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD/models:$PWD/cli:$PWD/services/common:$PWD/clients/python
if compgen -G '.whl/*.whl' >/dev/null; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    for wheel in .whl/*.whl; do "$python" -m zipfile -e "$wheel" "$packages"; done
    PYTHONPATH=$PYTHONPATH:$packages
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
"$python" -c 'import torch; print("PyTorch", torch.__version__)' | tee -a "$out/gpu.txt"
# A failure here is a finding, and the times are one more.
timeout 150 "$python" -m pytest -q -p no:cacheprovider models/openpi_flash_models/torch/cuda_test.py 2>&1 | tee "$out/tests.txt" || true
timeout 90 "$python" benchmarks/kernels.py --json "$out/kernels.json" 2>&1 | tee "$out/kernels.txt" || true
bench() { # NAME SECONDS ARGUMENT...: those arms side by side up to where they are timed
    timeout "$2" "$python" -m openpi_flash_cli.bench model --together 4 --json "$out/$1.json" --plot "$out/$1.png" "${@:3}" 2>&1 | tee "$out/$1.txt"
}
bench torch "${TORCH_S:-120}" --profile --batches 1 4 8 --arms torch torch-fp8 torch-guided "$@" || true
# XLA compiles for minutes.
bench jax "${JAX_S:-200}" --batches 1 --arms jax planner "$@"
