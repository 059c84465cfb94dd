#!/usr/bin/env bash
# The main job of a task on the embedded model: sample without and with Skip-Cache, compare speed and fidelity.
#   bash scripts/demo.sh [class-to-image | class-to-video]
set -euo pipefail
cd "$(dirname "$0")/.."
task=${1:-class-to-image}
case $task in
  class-to-image) settings=(num_samples=20 --repeats 2) ;;
  class-to-video) settings=(num_samples=8) ;;
  *) echo "no demo for '$task'; there are class-to-image and class-to-video" >&2; exit 2 ;;
esac
bash scripts/setup.sh
.venv/bin/python "$task/compare.py" --config "configs/$task/demo.yaml" "${settings[@]}"
