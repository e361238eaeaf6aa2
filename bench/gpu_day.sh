#!/usr/bin/env bash
# A device day: what a machine with an NVIDIA GPU shows about this library in at most 9 minutes.
#
#   bench/gpu_day.sh                                       writes bench/gpu-day-<device>-<part>.json
#   TRITON_INTERPRET=1 bench/gpu_day.sh --quick --out DIR  without a GPU, at toy sizes: to see that it runs
#
# It needs Python with torch, triton, transformers, numba and scipy, and fetches nothing; the library need not be
# installed. PYTHON names another interpreter. A part that fails is named at the end, and the parts after it run.
# Exit code 1: a part failed. 2: there is neither a GPU nor TRITON_INTERPRET=1, or an option is wrong, or the folder
# cannot be written. Ctrl-C ends the day, and the running part writes what it has.
set -u

case " $* " in *" -h "* | *" --help "*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

total=530 # seconds, and 5 more to stop a part that does not stop itself
parts="check:90 kernels:190 steps:80 seven_b:90 paging:75" # a limit in seconds each
margin=10 # seconds before its limit at which a part stops itself

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

can="import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, ('torch', 'triton', 'transformers'))))"
for python in ${PYTHON:-"$root/.venv/bin/python" python3 python3.12 python}; do
    if "$python" -c "$can" 2>/dev/null; then break; fi
    python=
done
if [ -z "$python" ]; then
    echo "found no Python with torch, triton and transformers: name one, PYTHON=/path/to/python $0" >&2
    exit 2
fi

failed=0 summary=""
trap : INT # the part gets the signal too, and writes what it has
for entry in $parts; do
    part=${entry%:*} limit=${entry#*:} begin=$SECONDS
    left=$((total - SECONDS))
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    if [ "$limit" -le "$margin" ]; then
        code=124
    else
        echo "== $part, $limit s at most" >&2
        timeout --foreground -k 5 "$limit" "$python" -W ignore "$root/bench/gpu_day.py" "$part" --seconds $((limit - margin)) "$@"
        code=$?
    fi
    case $code in
        0) result=ok ;;
        2) exit 2 ;;
        130) exit 130 ;;
        124 | 137 | 143) result="failed: no time" failed=1 ;;
        *) result="failed" failed=1 ;;
    esac
    summary+=$(printf '%-8s %4d s  %s' "$part" $((SECONDS - begin)) "$result")$'\n'
done
printf '\n%s%-8s %4d s\n' "$summary" all "$SECONDS"
exit $failed
