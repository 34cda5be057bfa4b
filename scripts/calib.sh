#!/usr/bin/env bash
# Calibrate a trained Swin on ImageNet, export INT8 modes 1 and 2, judge both and write the report.
#
#   bash scripts/calib.sh /data/imagenet swin_tiny_patch4_window7_224.pth
#   GPUS=8 bash scripts/calib.sh /data/imagenet swin_large.pth --calibrator mse --tag mse
#
# Further arguments go to swinq and override the settings below. The checkpoint tells the model; where it cannot, add --cfg NAME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data="${1:?folder or zip of ImageNet, see the head of this file}"
checkpoint="${2:?trained checkpoint, see the head of this file}"
shift 2

bash scripts/install.sh
exec .venv/bin/torchrun --standalone --nproc_per_node "${GPUS:-1}" swinq/main.py --calib \
    --data-path "$data" --resume "$checkpoint" \
    --opts CALIB.NUM_BATCHES 10 CALIB.BATCH_SIZE 64 DATA.BATCH_SIZE 128 "$@"
