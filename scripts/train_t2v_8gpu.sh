#!/usr/bin/env bash
# Train Skip-DiT (Latte T2V) on captioned clips of 16 frames, 512x512, on the GPUs of one machine. The same command again
# continues an interrupted run.
#   bash scripts/train_t2v_8gpu.sh stage1                             # skips onto the released plain Latte ...
#   bash scripts/train_t2v_8gpu.sh stage2                             # ... then everything
#   GPUS=4 bash scripts/train_t2v_8gpu.sh stage1 train.micro_batch_size=1
set -euo pipefail
cd "$(dirname "$0")/.."

stage="${1:-}"
case "$stage" in
  stage1 | stage2) shift ;;
  *)
    echo "usage: [GPUS=8] bash scripts/train_t2v_8gpu.sh stage1|stage2 [--dry-run] [key=value ...]" >&2
    echo "       the stages are configs/text-to-video/t2v_train_{stage1,stage2}.yaml" >&2
    exit 2
    ;;
esac

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" text-to-video/train.py \
  --config "configs/text-to-video/t2v_train_$stage.yaml" "$@"
