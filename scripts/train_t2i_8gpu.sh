#!/usr/bin/env bash
# Train Hunyuan-DiT on captioned pictures of about 1024x1024, on the GPUs of one machine. The same command again
# continues an interrupted run.
#   bash scripts/train_t2i_8gpu.sh stage1                             # skips onto a backbone without ...
#   bash scripts/train_t2i_8gpu.sh stage2                             # ... then everything
#   GPUS=1 bash scripts/train_t2i_8gpu.sh lora                        # adapters on the released model
#   GPUS=4 bash scripts/train_t2i_8gpu.sh stage1 train.micro_batch_size=1
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  stage1 | stage2) config="t2i_train_$1" ;;
  lora) config=t2i_lora ;;
  *)
    echo "usage: [GPUS=8] bash scripts/train_t2i_8gpu.sh stage1|stage2|lora [--dry-run] [key=value ...]" >&2
    echo "       they are configs/text-to-image/t2i_{train_stage1,train_stage2,lora}.yaml" >&2
    exit 2
    ;;
esac

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" text-to-image/train.py \
  --config "configs/text-to-image/$config.yaml" "${@:2}"
