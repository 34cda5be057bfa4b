#!/usr/bin/env bash
# Make or reuse .venv and install swinq into it, editable, with the versions of constraints.txt.
#
#   bash scripts/install.sh          what the commands need
#   bash scripts/install.sh dev      with the linters and the tests' packages
#
# SWINQ_TORCH_INDEX=URL  take torch and torchvision from that package index (for example the one
#                        with CPU-only wheels) instead of pip's own
# SWINQ_CUDA=0             leave the CUDA engine out; =1 demand it; else it is built where nvcc is. Later:
#                        bash scripts/build_kernels.sh
# SWINQ_PYTHON=python3.12  interpreter for a new .venv; default: the first Python >= 3.10 found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
venv=.venv
stamp="$venv/.swinq-installed"

stop() {
    printf 'swinq: %s\n  fix: %s\n' "$1" "$2" >&2
    exit 1
}

find_python() {
    local name
    for name in ${SWINQ_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    stop "no Python >= 3.10 found as ${SWINQ_PYTHON:-python3}" \
        "install one (Debian: apt-get install python3 python3-venv) or name it in SWINQ_PYTHON"
}

# What an installation depends on; 'dev' holds everything that the plain one does.
wanted() {
    {
        cat pyproject.toml setup.py constraints.txt
        pwd
        echo "${SWINQ_TORCH_INDEX:-} $1"
    } | cksum
}

if [[ -f "$stamp" ]] && "$venv/bin/python" -c '' >/dev/null 2>&1; then
    installed="$(cat "$stamp")"
    if [[ "$installed" == "$(wanted dev)" || "$installed" == "$(wanted "$extra")" ]]; then
        exit 0
    fi
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "swinq: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || stop "$python cannot make a virtual environment" \
        "install its venv module (Debian: apt-get install python3-venv) and run this again"
fi

echo "swinq: installing into $venv; the first time this takes minutes, most of them for torch"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --constraint constraints.txt)
[[ -t 1 ]] || pip+=(--quiet)
if [[ -n "${SWINQ_TORCH_INDEX:-}" ]]; then
    "${pip[@]}" --index-url "$SWINQ_TORCH_INDEX" torch torchvision || stop \
        "pip could not install torch from SWINQ_TORCH_INDEX=$SWINQ_TORCH_INDEX" \
        "check the address, or unset SWINQ_TORCH_INDEX to take torch from pip's own index"
fi
"${pip[@]}" --editable ".${extra:+[$extra]}" || stop "pip could not install swinq's dependencies" \
    "see pip's words above; a network or a disk with 8 GB free may be missing"
wanted "$extra" >"$stamp"
