#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, kernels, tests with coverage.
# With arguments, only those tests: bash scripts/test.sh tests/quant, bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SWINQ_CUDA=0 bash scripts/install.sh dev  # kernels have a step of their own
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the tests run side by side, one a core
pytest=(.venv/bin/python -m pytest --numprocesses auto --dist loadfile -m "not slow and not gpu")

step() { printf '\n== %s\n' "$*"; }

if (($#)); then
    exec "${pytest[@]}" "$@"
fi

step ruff
.venv/bin/ruff check .
.venv/bin/ruff format --check .

step mypy
.venv/bin/mypy

step kernels
bash scripts/build_kernels.sh
if [[ -x build/kernels/engine_test ]]; then
    build/kernels/engine_test
fi

step pytest
exec "${pytest[@]}" -p tests.branch_floor --branch-floor 90 --cov --cov-report term
