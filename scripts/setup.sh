#!/usr/bin/env bash
# Make a virtual environment with the project and its development tools: scripts/setup.sh [FOLDER]
# Idempotent. System packages are installed where that needs no question; otherwise they are named and the rest goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
extras=${EXTRAS:-dev}

source scripts/apt.sh

say() { printf 'setup: %s\n' "$*" >&2; }

supported() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

python=$(find_python) || { apt_install python3 python3-venv || true; python=$(find_python); } || {
  say "no Python 3.11 or 3.12 found. Install one (Debian 12: apt install python3 python3-venv;" \
    "Ubuntu 24.04 likewise), or name it: make PYTHON=/path/to/python3.12"
  exit 1
}

if [ ! -x "$venv/bin/python" ] || ! supported "$venv/bin/python"; then
  rm -rf "$venv"
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    apt_install "python$version-venv" || {
      say "$python cannot make virtual environments; install the package python$version-venv and run this again"
      exit 1
    }
  fi
  "$python" -m venv "$venv"
fi

# torch.compile on CPU and Triton's launcher on GPU compile small C++ files at run time.
if ! command -v g++ >/dev/null; then
  apt_install g++ python3-dev ||
    say "no C++ compiler: training works, but uncompiled. Install g++ and python3-dev for the full speed"
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install -q -c constraints.txt setuptools wheel
"$venv/bin/python" -m pip install -q -c constraints.txt --no-build-isolation -e ".[$extras]"
# The peer that attacks are compared with. It pins a requests that the documentation's tools refuse and never
# imports it, so it comes without its dependencies.
[ "$extras" != dev ] || "$venv/bin/python" -m pip install -q -c constraints.txt --no-deps torchattacks
# FFCV, for data that does not fit the device; the rest works without it. FFCV=0 leaves it out.
[ "${FFCV:-1}" = 0 ] || scripts/ffcv.sh "$venv"
say "ready: $venv/bin/arat-fast"
