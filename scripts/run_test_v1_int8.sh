#!/usr/bin/env bash
# Times of every Swin v1 in INT8 modes 1 and 2 at one batch size.
#
#   bash scripts/run_test_v1_int8.sh 32
#
# Variables: see run_test.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_test.sh" 1 int8 "$@"
