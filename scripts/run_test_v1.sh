#!/usr/bin/env bash
# Times of every Swin v1 in FP32 and FP16 at one batch size.
#
#   bash scripts/run_test_v1.sh 32
#
# Variables: see run_test.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_test.sh" 1 float "$@"
