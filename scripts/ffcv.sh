#!/usr/bin/env bash
# Install FFCV 1.0.2 into a virtual environment, the light way: scripts/ffcv.sh [FOLDER]
# Idempotent. FFCV links OpenCV's core and imgproc and turbojpeg alone, so only these are installed (14 packages,
# 49 MB; the documented libopencv-dev brings 212). Where FFCV cannot be installed this says why and exits 0: training
# goes on with the other loaders.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=$venv/bin/python
version=1.0.2
packages=(libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev)

source scripts/apt.sh

say() { printf 'ffcv: %s\n' "$*" >&2; }
leave() {
  say "$*"
  say "FFCV is not installed: training works without it, with --loader resident or torchvision"
  exit 0
}

[ -x "$python" ] || { say "$venv has no Python: make it first with scripts/setup.sh $venv"; exit 1; }

works() { # what FFCV needs can be imported, and the pinned version is there
  "$python" - "$version" >/dev/null 2>&1 <<'CHECK'
import importlib.metadata, sys
assert importlib.metadata.version("ffcv") == sys.argv[1]
import cv2, ffcv._libffcv, numba, PIL, torch, tqdm  # noqa: F401
import ffcv.loader
CHECK
}

if works; then
  say "FFCV $version is there"
  exit 0
fi

have_headers() {
  [ -e /usr/include/turbojpeg.h ] && [ -e /usr/include/opencv4/opencv2/core.hpp ] &&
    [ -e /usr/include/opencv4/opencv2/imgproc.hpp ]
}

missing=()
have_headers || missing+=("${packages[@]}")
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
if [ ${#missing[@]} -gt 0 ]; then
  apt_install "${missing[@]}" ||
    leave "system packages are missing and cannot be installed from here; have an administrator run:" \
      "apt-get install --no-install-recommends ${missing[*]}"
  have_headers || leave "the system packages ${packages[*]} are installed, but their headers are not under /usr/include"
fi

# FFCV asks pkg-config for all of OpenCV and includes <opencv2/opencv.hpp>; give it the two parts it uses.
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir -p "$build/include/opencv2"
cat >"$build/include/opencv2/opencv.hpp" <<'HEADER'
#pragma once
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
HEADER
cat >"$build/opencv4.pc" <<PKGCONFIG
Name: OpenCV
Description: the parts of OpenCV that FFCV uses
Version: 4
Libs: -lopencv_core -lopencv_imgproc
Cflags: -I$build/include -I/usr/include/opencv4
PKGCONFIG

export PIP_DISABLE_PIP_VERSION_CHECK=1
# With the constraints: NumPy and torch stay as they are. `setuptools` has the distutils that Python 3.12 lacks.
"$python" -m pip install -q -c constraints.txt numpy numba opencv-python-headless pillow tqdm setuptools wheel ||
  leave "pip cannot install numba, opencv-python-headless and the like (no network?)"
# Its declared requirements would bring pytorch-pfn-extras, which FFCV uses for nothing that is used here.
log=$build/pip.log
PKG_CONFIG_PATH=$build${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} "$python" -m pip install --no-deps --no-build-isolation \
  --no-cache-dir "ffcv==$version" >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  leave "FFCV $version does not build here (see above)"
}
works || {
  "$python" -c 'import ffcv.loader' >&2 || true
  leave "FFCV $version was built but cannot be imported (see above)"
}
say "ready: FFCV $version in $venv"
