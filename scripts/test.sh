#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, shell syntax, tests with coverage.
# Further arguments go to pytest: bash scripts/test.sh -m slow -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the tests run side by side, one a core

step() { printf '\n== %s\n' "$*"; }

step ruff
.venv/bin/ruff check .
.venv/bin/ruff format --check .

step mypy
.venv/bin/mypy

step pytest
exec .venv/bin/python -m pytest -n auto --dist loadfile -m "not slow and not gpu" \
    --cov --cov-report term --cov-fail-under 90 "$@"
