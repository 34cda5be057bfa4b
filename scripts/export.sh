#!/usr/bin/env bash
# Write the INT8 checkpoint of a calibrated one, in mode 1 unless MODE says 2.
#
#   bash scripts/export.sh path/to/calibrated.safetensors
#   MODE=2 bash scripts/export.sh path/to/calibrated.safetensors --calib-output-path exported
#
# Further arguments go to swinq and override the settings below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checkpoint="${1:?calibrated checkpoint, see the head of this file}"
shift

bash scripts/install.sh
exec .venv/bin/torchrun --standalone swinq/main.py --export \
    --resume "$checkpoint" --opts INT8.MODE "${MODE:-1}" "$@"
