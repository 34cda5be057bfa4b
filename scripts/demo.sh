#!/usr/bin/env bash
# The demo: calibrate, export, run in INT8 and judge a small trained Swin on real handwritten digits.
# Needs Python >= 3.10 and nothing else; further arguments go to swinq (bash scripts/demo.sh --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh
exec .venv/bin/torchrun swinq/main.py --calib "$@"
