#!/usr/bin/env bash
# mypy --strict on the installed package: type checkers cannot follow the editable mapping of kernels/ and loaders/.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
target=$(mktemp -d)
trap 'rm -rf "$target" build' EXIT
"$venv/bin/python" -m pip install -q --no-deps --no-build-isolation --target "$target" .
MYPYPATH=$target "$venv/bin/python" -m mypy --config-file pyproject.toml -p arat_fast
