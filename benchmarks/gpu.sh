#!/usr/bin/env bash
# Tests and measurements of bam_kernels on this machine's NVIDIA GPU, from the source tree alone.
#
#     bash benchmarks/gpu.sh [OUTPUT.json] [options of gpu.py; see --help]
#
# Needs a Python with torch, Triton and pytest (PYTHON names it; python3 otherwise); nothing is
# installed and no setting of the GPU is changed. Results go into $OUT, the folder for results, if
# set, and into benchmarks/results otherwise. Exit status: 0 all right, 1 a test or a check failed
# (all was measured nonetheless), 2 the run could not begin and nothing was written.
set -u

fail() {
    echo "gpu.sh: $*" >&2
    exit 2
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || fail "cannot enter the source tree"
python=${PYTHON:-python3}
command -v "$python" >/dev/null 2>&1 || fail "no '$python' on the PATH; set PYTHON"

output=()
if [[ $# -gt 0 && $1 != -* ]]; then
    output=(--output "$1")
    shift
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/benchmarks/gpu.py" ${output[@]+"${output[@]}"} "$@"
