#!/usr/bin/env bash
# Train Skip-DiT on ImageNet 256x256 on several machines that see this folder. Run it once on each:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/train_c2i_multinode.sh scratch    # on node0
#   NNODES=4 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/train_c2i_multinode.sh scratch    # on node1, and so on
# Slurm knows the first two:
#   MASTER_ADDR=node0 srun --ntasks-per-node 1 bash scripts/train_c2i_multinode.sh scratch
# The config's batch_size counts the samples of all GPUs. train.parallel=fsdp shards the model instead of copying it.
set -euo pipefail
cd "$(dirname "$0")/.."

NNODES="${NNODES:-${SLURM_NNODES:-}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
stage="${1:-}"
case "$stage" in scratch | stage1 | stage2) ;; *) stage="" ;; esac
if [ -z "$stage" ] || [ -z "$NNODES" ] || [ -z "$NODE_RANK" ] || [ -z "${MASTER_ADDR:-}" ]; then
  cat >&2 <<'USAGE'
usage: bash scripts/train_c2i_multinode.sh scratch|stage1|stage2 [key=value ...], on every machine, with
  NNODES       number of machines
  NODE_RANK    number of this machine, from 0
  MASTER_ADDR  name or address of machine 0
  MASTER_PORT  a free port there [29500]
  GPUS         GPUs of each machine [8]
USAGE
  exit 2
fi
shift

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend static --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" class-to-image/train.py \
  --config "configs/class-to-image/imagenet256_$stage.yaml" "$@"
