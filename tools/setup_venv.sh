#!/usr/bin/env bash
# Make a virtual environment with torch, mmcv (compiled), mmdet and this package in it.
# Usage: [PYTHON=python3] [TORCH=torch==2.13.0] [STACK=openmmlab] tools/setup_venv.sh FOLDER
# TORCH may name further packages whose versions have to go with it. STACK=onedl takes the
# maintained forks of mmcv and mmdet. CFLAGS are the compiler's options for mmcv.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?FOLDER is missing}
python=${PYTHON:-python3}
read -ra torch <<<"${TORCH:-torch==2.13.0}"
case ${STACK:=openmmlab} in
    openmmlab) stack=requirements/mminstall.txt ;;
    onedl) stack=requirements/mminstall-onedl.txt ;;
    *) echo "STACK is $STACK; openmmlab and onedl are known." >&2 && exit 1 ;;
esac

"$python" - <<'PY'
import sys
if sys.version_info < (3, 10):
    sys.exit(f'Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}; '
             'name another with PYTHON=...')
PY
if ! command -v c++ >/dev/null; then
    echo 'A C++ compiler is needed to build mmcv (Debian: apt-get install g++).' >&2
    exit 1
fi

echo "== 1/4  virtual environment in $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# By exact version: a range lets pip fetch gigabytes of CUDA libraries.
echo "== 2/4  ${torch[*]}"
pip install --quiet "${torch[@]}"
pip install --quiet -r requirements/build.txt
# What is installed later must leave these versions as they are.
printf '%s\n' "${torch[@]}" | grep -E '^[A-Za-z0-9._-]+[<>=~!]' >"$venv/torch.txt" || true
# pip's cache does not tell a wheel of mmcv that was compiled for another torch: one for each.
version=$("$venv/bin/python" -c 'import torch; print(torch.__version__)')
cache=$(pip cache dir 2>/dev/null) && cache=$cache/torch-$version || cache=

# mmcv asks for C++17, and torch's headers from 2.14 on for C++20: the last option counts.
headers=$("$venv/bin/python" -c 'import torch; print(*torch.__path__)')/include
if grep -q 'C++20 or later' "$headers/ATen/ATen.h"; then
    printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "${CXX:-c++}" >"$venv/bin/c++20"
    chmod +x "$venv/bin/c++20"
    CXX=$(realpath "$venv/bin/c++20") && export CXX
fi

echo '== 3/4  mmcv and mmdet; mmcv is compiled: about 8 minutes on 2 cores the first time, then'
echo '        pip has the wheel. Its progress (files compiled/files in all):'
log=$venv/mmcv-build.log
# The constraint keeps mmdet's dependencies from replacing the setuptools that mmcv needs.
MMCV_WITH_OPS=1 CFLAGS=${CFLAGS:--g0} pip ${cache:+--cache-dir "$cache"} install --verbose \
    --no-build-isolation --no-binary mmcv,onedl-mmcv \
    -c requirements/build.txt -c "$venv/torch.txt" -r "$stack" 2>&1 |
    tee "$log" | grep --line-buffered --only-matching --extended-regexp '^ *\[[0-9]+/[0-9]+\]' || true
if ! "$venv/bin/python" -c 'import mmcv.ops, mmdet' 2>>"$log"; then
    tail -n 30 "$log" >&2
    echo "mmcv or mmdet did not install; the whole log is $log" >&2
    exit 1
fi

echo '== 4/4  this package and what its tests need'
pip install --quiet -c "$venv/torch.txt" -r requirements.txt
pip install --quiet --no-build-isolation --no-deps -e .
