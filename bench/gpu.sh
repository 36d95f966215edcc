#!/usr/bin/env bash
# Everything that a GPU machine is needed for, in one command and under 10 minutes: build, GPU tests,
# benchmarks, every kernel's time, memory and race checks, tuning. Downloads nothing. What to
# compare the numbers with is in bench/results/NOTES.md, and needs no GPU.
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
export PATH=$PATH:/usr/local/cuda/bin
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

# Machine code for this GPU only: every other architecture would cost time.
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST

step build 110 env DENSITYRL_CUDA=1 "$PYTHON" setup.py build_ext --inplace
step tests 170 "$PYTHON" -m pytest -m gpu --require-gpu "${gpu_tests[@]}"
step bench 160 "$PYTHON" -m pytest bench --bench-device cuda --bench-full --bench-save \
    --bench-results "$OUT" --bench-table "$OUT/table.md" "${commit[@]}"
step kernels 20 "$PYTHON" bench/kernel_times.py --json "$OUT/kernels.json"
for tool in memcheck racecheck; do
    step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$PYTHON" -m pytest -m gpu --require-gpu tests/kernels/test_gpu_kernels.py \
        -k 'small_cuda and (eg3d or crm)'
done
step tune 40 "$PYTHON" bench/tune.py --seconds 20 --json "$OUT/tiles.json"

echo "gpu.sh: $failed of 7 steps failed; logs and results in $OUT"
exit "$failed"
