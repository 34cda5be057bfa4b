#!/usr/bin/env bash
# The table that run_test_v1.sh, run_test_v2.sh and their _int8 forms print: how long every model
# takes at one batch size, by the C++ programs, which check their output before they time it.
#
#   bash scripts/run_test.sh VERSION FORM BATCH      VERSION 1 or 2, FORM float or int8
#
# SWINQ_PROGRAMS=FOLDER  where swin_example and swin_int8_example are; default: build/kernels
# SWINQ_MODELS="T S"     only models whose first letter is here; default: T S B L
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
    printf 'swinq: %s\n  fix: %s\n' "$1" "$2" >&2
    exit "${3:-1}"
}

version="${1:-}" form="${2:-}" batch="${3:-}"
(($# <= 3)) || stop "'$4' is one argument too many" "give one number of images: <batch>" 2
[[ "$batch" =~ ^[1-9][0-9]*$ ]] || stop "batch is '$batch'" "give the number of images: <batch>" 2
case "$version" in
    1) models=("0 7 224" "1 7 224" "2 7 224" "2 12 384" "3 7 224" "3 12 384") ;;
    2) models=("0 8 256" "0 16 256" "1 8 256" "1 16 256" "2 8 256" "2 16 256" "2 24 384"
        "3 16 256" "3 24 384") ;;
    *) stop "version is '$version'" "give 1 or 2" 2 ;;
esac
case "$form" in
    float) program=swin_example kinds=("0 FP32" "1 FP16") ;;
    int8) program=swin_int8_example kinds=("1 INT8 mode 1" "2 INT8 mode 2") ;;
    *) stop "form is '$form'" "give float or int8" 2 ;;
esac
path="${SWINQ_PROGRAMS:-build/kernels}/$program"
[[ -x "$path" ]] || stop "there is no $path" "bash scripts/build_kernels.sh"

sizes=(T S B L)
wanted="${SWINQ_MODELS:-T S B L}"
[[ "$wanted" =~ ^[TSBL](\ [TSBL])*$ ]] ||
    stop "SWINQ_MODELS is '$wanted'" "give first letters, such as 'T S'" 2
failed=0
printf '| model | window | image | batch | numbers | ms | images/s |\n'
printf '|---|---|---|---|---|---|---|\n'
for model in "${models[@]}"; do
    read -r size window image <<<"$model"
    [[ "$wanted" == *"${sizes[$size]}"* ]] || continue
    for kind in "${kinds[@]}"; do
        row="Swin-${sizes[$size]} v$version | $window | $image | $batch | ${kind#* }"
        arguments=("$version" "${kind%% *}" "$size" "$window" "$image" "$batch")
        if output="$("$path" "${arguments[@]}" 2>&1)"; then
            ms="$(sed -n 's/^SWINQ-CPP-time \([0-9.]*\) ms$/\1/p' <<<"$output")"
            printf '| %s | %.3f | %.0f |\n' "$row" "$ms" \
                "$(awk -v batch="$batch" -v ms="$ms" 'BEGIN { print 1000 * batch / ms }')"
        else
            printf '| %s | failed | |\n' "$row"
            printf '%s\n' "$output" >&2
            failed=1
        fi
    done
done
exit "$failed"
