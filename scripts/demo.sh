#!/usr/bin/env bash
# The main job of a task on the embedded model: sample without and with Skip-Cache, compare speed and fidelity.
#   bash scripts/demo.sh [class-to-image]
set -euo pipefail
cd "$(dirname "$0")/.."
task=${1:-class-to-image}
case $task in
  class-to-image) ;;
  *) echo "no demo for '$task' yet; there is one for class-to-image" >&2; exit 2 ;;
esac
bash scripts/setup.sh
.venv/bin/python "$task/compare.py" --config "configs/$task/demo.yaml" num_samples=20 --repeats 2
