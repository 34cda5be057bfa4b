#!/usr/bin/env bash
# Top-1 and top-5 of a checkpoint on ImageNet's validation images: float, calibrated or INT8.
#
#   bash scripts/eval.sh /data/imagenet swin_tiny_patch4_window7_224.pth
#   GPUS=8 bash scripts/eval.sh /data/imagenet path/to/int8_mode1.safetensors
#
# Further arguments go to swinq and override the settings below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data="${1:?folder or zip of ImageNet, see the head of this file}"
checkpoint="${2:?checkpoint to judge, see the head of this file}"
shift 2

bash scripts/install.sh
exec .venv/bin/torchrun --standalone --nproc_per_node "${GPUS:-1}" swinq/main.py --eval \
    --data-path "$data" --resume "$checkpoint" --opts DATA.BATCH_SIZE 128 "$@"
