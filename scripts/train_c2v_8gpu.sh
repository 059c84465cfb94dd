#!/usr/bin/env bash
# Train Skip-DiT (Latte) on clips of 16 frames, 256x256, on the GPUs of one machine. The same command again continues an
# interrupted run.
#   bash scripts/train_c2v_8gpu.sh ucf101 scratch                     # as in the paper
#   bash scripts/train_c2v_8gpu.sh ucf101 stage1                      # skips onto a released plain Latte ...
#   bash scripts/train_c2v_8gpu.sh ucf101 stage2                      # ... then everything
#   GPUS=4 bash scripts/train_c2v_8gpu.sh ffs stage1 train.micro_batch_size=4
set -euo pipefail
cd "$(dirname "$0")/.."

dataset="${1:-}" stage="${2:-}"
case "$dataset" in ffs | sky | taichi | ucf101) ;; *) dataset="" ;; esac
case "$stage" in scratch | stage1 | stage2) ;; *) stage="" ;; esac
if [ -z "$dataset" ] || [ -z "$stage" ]; then
  cat >&2 <<'USAGE'
usage: [GPUS=8] bash scripts/train_c2v_8gpu.sh ffs|sky|taichi|ucf101 scratch|stage1|stage2 [--dry-run] [key=value ...]
       the runs are configs/class-to-video/{ffs,sky,taichi,ucf101}_{scratch,stage1,stage2}.yaml
USAGE
  exit 2
fi
shift 2

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" class-to-video/train.py \
  --config "configs/class-to-video/${dataset}_$stage.yaml" "$@"
