#!/usr/bin/env bash
# Train a config of any task on the GPUs of this machine. The same command again continues an interrupted run.
#   bash scripts/train.sh class-to-image imagenet256_stage1
#   GPUS=4 bash scripts/train.sh class-to-image imagenet256_stage1 train.micro_batch_size=32
# On several machines that see this folder, once on each:
#   export NNODES=4 MASTER_ADDR=node0
#   NODE_RANK=0 bash scripts/train.sh class-to-image imagenet256_scratch    # on node0
#   NODE_RANK=1 bash scripts/train.sh class-to-image imagenet256_scratch    # on node1, and so on
# Slurm knows the number of machines and of this one:
#   MASTER_ADDR=node0 srun --ntasks-per-node 1 bash scripts/train.sh class-to-video ucf101_scratch
# The config's batch_size counts the samples of all GPUs. train.parallel=fsdp shards the model instead of copying it.
set -euo pipefail
cd "$(dirname "$0")/.."

task="${1:-}" config="configs/${1:-TASK}/${2:-CONFIG}.yaml"
nodes="${NNODES:-${SLURM_NNODES:-1}}"
rank="${NODE_RANK:-${SLURM_NODEID:-}}"
complain() {
  echo "error: $1" >&2
  cat >&2 <<'USAGE'
usage: bash scripts/train.sh TASK CONFIG [--dry-run] [key=value ...], for example with class-to-image
imagenet256_scratch: runs TASK/train.py with configs/TASK/CONFIG.yaml. Reads
  GPUS         GPUs of this machine [8]
  NNODES       machines [1]; with more than one, on each of them:
  NODE_RANK    number of this machine, from 0
  MASTER_ADDR  name or address of machine 0
  MASTER_PORT  a free port there [29500]
USAGE
  exit 2
}
if [ $# -lt 2 ]; then complain "a task and the name of a config are wanted"; fi
if [ ! -f "$task/train.py" ]; then complain "no task $task"; fi
if [ ! -f "$config" ]; then complain "no file $config"; fi
shift 2

where=(--standalone)
if [ "$nodes" -gt 1 ]; then
  if [ -z "$rank" ] || [ -z "${MASTER_ADDR:-}" ]; then complain "$nodes machines need NODE_RANK and MASTER_ADDR"; fi
  where=(--nnodes "$nodes" --node-rank "$rank" --rdzv-backend static --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
fi
if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun "${where[@]}" --nproc-per-node "${GPUS:-8}" "$task/train.py" --config "$config" "$@"
