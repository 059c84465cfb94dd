#!/usr/bin/env bash
# Train Skip-DiT on ImageNet 256x256 on the GPUs of one machine. The same command again continues an interrupted run.
#   bash scripts/train_c2i_8gpu.sh scratch                            # the paper's run
#   bash scripts/train_c2i_8gpu.sh stage1                             # skips onto a released plain DiT ...
#   bash scripts/train_c2i_8gpu.sh stage2                             # ... then everything
#   GPUS=4 bash scripts/train_c2i_8gpu.sh stage1 train.micro_batch_size=32
set -euo pipefail
cd "$(dirname "$0")/.."

stage="${1:-}"
case "$stage" in
  scratch | stage1 | stage2) shift ;;
  *)
    echo "usage: [GPUS=8] bash scripts/train_c2i_8gpu.sh scratch|stage1|stage2 [--dry-run] [key=value ...]" >&2
    echo "       the stages are configs/class-to-image/imagenet256_{scratch,stage1,stage2}.yaml" >&2
    exit 2
    ;;
esac

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" class-to-image/train.py \
  --config "configs/class-to-image/imagenet256_$stage.yaml" "$@"
