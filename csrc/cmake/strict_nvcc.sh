#!/usr/bin/env bash
# Runs the compiler that it is given and fails where that only warns of slow code: registers or arrays
# in local memory, and wgmma instructions that wait for one another (C7508 and its kin). SWINQ_STRICT=0
# leaves it at the warning: users have other compilers than the one that kernels were written with.
set -uo pipefail

said="$("$@" 2>&1)"
status=$?
if [[ -n "$said" ]]; then
    printf '%s\n' "$said" >&2
fi
if ((status != 0)) || [[ "${SWINQ_STRICT:-1}" == 0 ]]; then
    exit "$status"
fi

slow='[Rr]egisters are spilled|[Ll]ocal memory (used|usage)|C75[01][0-9]|wgmma.*serializ'
if grep -qE "$slow" <<<"$said"; then
    printf 'swinq: the warnings above mean slow code: %s\n' \
        "use fewer registers a thread, index arrays by constants, and read no accumulator in flight" >&2
    while (($# > 1)); do
        [[ "$1" != "-o" ]] || rm -f "$2" # so that the next build compiles it again
        shift
    done
    exit 1
fi
