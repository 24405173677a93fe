#!/usr/bin/env bash
# Kernel and training tests on the oldest supported stack: Python 3.12, torch 2.11, Triton 3.6 (and a NumPy newer than Triton
# 3.6 was made for). Twice: reference twins, then the kernels in Triton's interpreter. No GPU is used.
#
#   scripts/oldest.sh [pytest arguments]
#
# Makes .venv-oldest on the first call (about 6 GB: torch's wheel brings the CUDA libraries), then reuses it.
# PYTHON312 names the interpreter where python3.12 is not on the path.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-oldest

find_python() {
    if [[ -n ${PYTHON312:-} ]]; then
        echo "$PYTHON312"
    elif command -v python3.12 >/dev/null && python3.12 -c '' 2>/dev/null; then
        command -v python3.12
    else
        find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -path '*/3.12*/bin/python3.12' 2>/dev/null | sort -V | tail -n 1
    fi
}

complete='
import numpy, pytest, pytest_timeout, sklearn, torch, torchvision, triton
import arat_fast.config, arat_fast.kernels.dispatch
versions = torch.__version__[:5], triton.__version__[:4], numpy.__version__[:4]
assert versions == ("2.11.", "3.6.", "2.5."), versions
'
if ! "$venv/bin/python" -c "$complete" 2>/dev/null; then
    python=$(find_python)
    if [[ -z $python ]]; then
        echo "no Python 3.12 found: install one, or set PYTHON312 to its path" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --editable ".[digits]" "torch==2.11.*" "torchvision==0.26.*" "triton==3.6.*" \
        "numpy==2.5.*" "pytest>=8.3,<10" "pytest-timeout>=2.3,<3"
    "$venv/bin/python" -c "$complete"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "oldest stack, reference twins"
env -u TRITON_INTERPRET "$venv/bin/python" -m pytest -q -m "not gpu" tests/kernels "$@"
echo "oldest stack, the training iteration"
env -u TRITON_INTERPRET "$venv/bin/python" -m pytest -q -m "not gpu" tests/nn tests/training tests/methods --deselect \
    tests/training/test_full_size.py "$@"
echo "oldest stack, kernels in the interpreter"
TRITON_INTERPRET=1 "$venv/bin/python" -m pytest -q -m "not gpu" tests/kernels "$@"
echo "oldest stack, compiled for GPUs that are not here"
env -u TRITON_INTERPRET "$venv/bin/python" -m arat_fast.benchmarks.compile_only --target sm_80 --target sm_90 \
    --target gfx942 | tail -n 1
if command -v c++ >/dev/null; then
    echo "oldest stack, whole iterations compiled, captured and replayed on a GPU that is not here"
    env -u TRITON_INTERPRET "$venv/bin/python" scripts/pretend_gpu scripts/pretend_gpu/check_launches.py \
        arat-cifar10-resnet18 trades-cifar10-resnet18 lbgat-cifar10-resnet18 emr-mart-cifar10-resnet18
    echo "oldest stack, captured training and uncaptured there, every method"
    env -u TRITON_INTERPRET "$venv/bin/python" scripts/pretend_gpu --numbers scripts/pretend_gpu/check_methods.py
fi
