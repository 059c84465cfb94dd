#!/usr/bin/env bash
# Train a config of any task on several machines that see this folder. Run it once on each:
#   export NNODES=4 MASTER_ADDR=node0
#   NODE_RANK=0 bash scripts/train_multinode.sh class-to-image imagenet256_scratch    # on node0
#   NODE_RANK=1 bash scripts/train_multinode.sh class-to-image imagenet256_scratch    # on node1, and so on
# Slurm knows the number of machines and of this one:
#   MASTER_ADDR=node0 srun --ntasks-per-node 1 bash scripts/train_multinode.sh class-to-video ucf101_scratch
# The config's batch_size counts the samples of all GPUs. train.parallel=fsdp shards the model instead of copying it.
set -euo pipefail
cd "$(dirname "$0")/.."

NNODES="${NNODES:-${SLURM_NNODES:-}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
task="${1:-}" config="configs/${1:-TASK}/${2:-CONFIG}.yaml"
if [ ! -f "$config" ] || [ -z "$NNODES" ] || [ -z "$NODE_RANK" ] || [ -z "${MASTER_ADDR:-}" ]; then
  if [ $# -gt 1 ] && [ ! -f "$config" ]; then echo "error: no file $config" >&2; fi
  cat >&2 <<'USAGE'
usage: bash scripts/train_multinode.sh TASK CONFIG [key=value ...], on every machine, for example with
class-to-image imagenet256_scratch: runs TASK/train.py with configs/TASK/CONFIG.yaml. Reads
  NNODES       number of machines
  NODE_RANK    number of this machine, from 0
  MASTER_ADDR  name or address of machine 0
  MASTER_PORT  a free port there [29500]
  GPUS         GPUs of each machine [8]
USAGE
  exit 2
fi
shift 2

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend static --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" "$task/train.py" --config "$config" "$@"
