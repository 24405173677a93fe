#!/usr/bin/env bash
# Everything that only a GPU can show, in under eight minutes: the tests marked gpu, then the kernel benchmarks.
# Installs nothing. Results go to bench/out/; the summary is printed last.
#
#   bench/gpu.sh              PYTHON=python3 names the interpreter that holds torch and triton
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=bench/out
mkdir -p "$out"
unset TRITON_INTERPRET

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "no GPU that $python's torch can use" >&2
    exit 2
fi
if ! "$python" -c 'import arat_fast.kernels.dispatch' 2>/dev/null; then
    # Not installed: lay the package out as an installation would, by links.
    mkdir -p "$out/package/arat_fast"
    for part in "$PWD"/arat_fast/* "$PWD/kernels" "$PWD/loaders"; do
        ln -sfn "$part" "$out/package/arat_fast/$(basename "$part")"
    done
    export PYTHONPATH="$PWD/$out/package${PYTHONPATH:+:$PYTHONPATH}"
fi

tests=(tests)
if ! "$python" -c 'import arat_fast.config' 2>/dev/null; then
    echo "not every dependency is here: only the kernel tests are run"
    tests=(--confcutdir tests/kernels tests/kernels)
fi
options=()
"$python" -c 'import pytest_timeout' 2>/dev/null || options=(-o addopts=)

timeout 230 "$python" -m pytest -q -m gpu "${options[@]}" "${tests[@]}" >"$out/tests.txt" 2>&1
tests_status=$?
timeout 235 "$python" -m arat_fast.benchmarks.kernels --budget 200 --json "$out/kernels.json" >"$out/kernels.txt" 2>&1
benchmark_status=$?

echo "== tests marked gpu: exit status $tests_status"
grep -E '^(FAILED|ERROR)' "$out/tests.txt" | head -n 40
tail -n 1 "$out/tests.txt"
echo "== kernel benchmarks: exit status $benchmark_status"
cat "$out/kernels.txt"
((tests_status == 0 && benchmark_status == 0))
