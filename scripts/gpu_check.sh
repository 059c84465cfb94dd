#!/usr/bin/env bash
# Check correctness, speed and memory of everything on one CUDA GPU, in eight minutes: docs/gpu.md.
#   bash scripts/gpu_check.sh
#   bash scripts/gpu_check.sh --missing                    # what the last call had no time for
#   bash scripts/gpu_check.sh --only latency training --minutes 20
#   bash scripts/gpu_check.sh --device cpu --tiny          # tries the program out, on tiny models
#   WHEELS=DIR bash scripts/gpu_check.sh                   # packages that are missing here come from DIR/*.whl
set -euo pipefail
GPU_CHECK_BEGAN="$(date +%s)"
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi

site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
export GPU_CHECK_BEGAN PYTHONUNBUFFERED=1 PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "${WHEELS:-}" ]; then
  install=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site")
  if ! "${install[@]}" "$WHEELS"/*.whl; then  # one that does not fit must not keep out the others
    for wheel in "$WHEELS"/*.whl; do
      "${install[@]}" --upgrade "$wheel" || echo "warning: $wheel could not be installed" >&2
    done
  fi
fi

# Without an installed package the checkout's own folders make one.
if ! "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('skipdit') is None)"; then
  mkdir "$site/skipdit"
  ln -s "$root"/src/skipdit/* "$site/skipdit/"
  for task in class-to-image class-to-video text-to-video text-to-image; do
    ln -s "$root/$task" "$site/skipdit/${task//-/_}"
  done
fi

status=0
"$python" "$root/benchmarks/gpu" "$@" || status=$?
exit "$status"
