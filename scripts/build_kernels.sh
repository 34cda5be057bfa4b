#!/usr/bin/env bash
# Build the CUDA engine into swinq/int8/libswinq.so, and its programs and tests into build/kernels. Only
# what has changed is compiled. Needs nvcc and CMake, no GPU.
#
#   bash scripts/build_kernels.sh
#   SWINQ_ARCHITECTURES=90a bash scripts/build_kernels.sh     for one GPU only, which is quicker
#
# SWINQ_CUDA=0 does nothing; =1 fails where nvcc or CMake is missing, unset only says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[[ -x "$python" ]] || python=python3
SWINQ_TESTS=1 exec "$python" setup.py --quiet build_ext --inplace
