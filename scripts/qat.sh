#!/usr/bin/env bash
# Finetune a trained Swin with fake quantizers, distilled from its float self; export INT8 mode 1 and report.
#
#   bash scripts/qat.sh /data/imagenet swin_tiny_patch4_window7_224.pth
#   GPUS=8 bash scripts/qat.sh /data/imagenet swin_large.pth --cfg swin_large_patch4_window7_224_22kto1k_finetune
#
# A step has 512 images on 1, 2, 4 or 8 GPUs. Repeating the command goes on from the newest training checkpoint.
# Further arguments go to swinq and override the settings below; --cfg gives drop path and weight decay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data="${1:?folder or zip of ImageNet, see the head of this file}"
checkpoint="${2:?trained checkpoint, see the head of this file}"
shift 2
gpus="${GPUS:-1}"

bash scripts/install.sh
exec .venv/bin/torchrun --standalone --nproc_per_node "$gpus" swinq/main.py --train \
    --data-path "$data" --resume "$checkpoint" --distill \
    --opts CALIB.NUM_BATCHES 10 CALIB.BATCH_SIZE 64 \
    DATA.BATCH_SIZE 64 TRAIN.ACCUMULATION_STEPS $(((8 + gpus - 1) / gpus)) "$@"
