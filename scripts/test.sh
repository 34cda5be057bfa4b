#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests with coverage. With arguments,
# only those tests, without coverage: bash scripts/test.sh tests/quant, bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh dev
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

step pytest
exec "${pytest[@]}" -p tests.branch_floor --branch-floor 90 --cov --cov-report term
