#!/usr/bin/env bash
# Everything that a GPU machine is needed for, in one command and under 8 minutes:
# build, GPU tests, benchmarks, rooflines. Downloads nothing.
#
#   bash bench/gpu.sh
#
# OUT      folder for logs and results (default bench/results/gpu)
# PYTHON   an interpreter whose torch sees the GPU (default python3, else .venv/bin/python)
# COMMIT   what `git describe --always --dirty --abbrev=40` says, where the tree has no .git
#
# A step that fails or runs out of time does not stop the others; the exit status counts them.
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"

sees_gpu() {
    "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}
PYTHON=${PYTHON:-python3}
sees_gpu "$PYTHON" || PYTHON=.venv/bin/python
if ! sees_gpu "$PYTHON"; then
    echo "gpu.sh: no python3 or .venv/bin/python whose torch sees a GPU (set PYTHON)" >&2
    exit 2
fi
export PYTHONPATH=kernels:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

failed=0
step() { # name, seconds, command: into $OUT/name.log, and the end of it here
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    # An interrupt first, so that pytest still prints its table.
    timeout --signal INT --kill-after 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    tail -n 80 "$OUT/$name.log"
    echo "== $name: status $status, $((SECONDS - start)) s"
    if [ "$status" -ne 0 ]; then failed=$((failed + 1)); fi
}

versions() {
    "$PYTHON" --version
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name())'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)' || true
    nvidia-smi || true
}
versions 2>&1 | tee "$OUT/versions.log"

# The files with GPU tests only: others may import packages that this machine does not have.
mapfile -t gpu_tests < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
commit=()
if [ -n "${COMMIT:-}" ]; then commit=(--bench-commit "$COMMIT"); fi

step build 90 "$PYTHON" setup.py build_ext --inplace
step tests 220 "$PYTHON" -m pytest -m gpu --require-gpu "${gpu_tests[@]}"
step bench 190 "$PYTHON" -m pytest bench --bench-device cuda --bench-full --bench-save \
    --bench-results "$OUT" --bench-table "$OUT/table.md" "${commit[@]}"
step tune 60 "$PYTHON" bench/tune.py --json "$OUT/tiles.json"
step roofline 30 "$PYTHON" bench/roofline.py

echo "gpu.sh: $failed of 5 steps failed; logs and results in $OUT"
exit "$failed"
