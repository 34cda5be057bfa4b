#!/usr/bin/env bash
# Times of every Swin v2 in FP32 and FP16 at one batch size.
#
#   bash scripts/run_test_v2.sh 32
#
# Variables: see run_test.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_test.sh" 2 float "$@"
