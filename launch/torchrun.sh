#!/usr/bin/env bash
# This node's ranks under torchrun, a rank a GPU: the same command on every node, with the flags of train_ds.py.
#   one node:     bash launch/torchrun.sh --train_manifest … --output_dir …
#   several:      NNODES=2 NODE_RANK=0 MASTER_ADDR=node01 bash launch/torchrun.sh …     and NODE_RANK=1 on the other
#   under Slurm:  srun --ntasks-per-node=1 bash launch/torchrun.sh …                    Slurm says the rest
# NPROC_PER_NODE: ranks on this node (default: its GPUs, or 1 with DS_ACCELERATOR=cpu). MASTER_PORT: default 29500, or
# by the Slurm job. torchrun ends with 1 whatever its ranks ended with: see docs/many-machines.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

of_job() { # NODELIST JOB: where the ranks of a Slurm job meet
  "$PYTHON" -c 'import sys
from higgs_ds.distributed.launch_env import first_host
from higgs_ds.distributed.ports import port_of_job
print(first_host(sys.argv[1]), port_of_job(sys.argv[2]))' "$1" "$2"
}
if [ -n "${SLURM_STEP_ID:-}" ] && [ -z "${NNODES:-}" ]; then
  nodes=${SLURM_STEP_NUM_NODES:-1} tasks=${SLURM_STEP_NUM_TASKS:-1}
  if [ "$nodes" -ne "$tasks" ]; then
    echo "torchrun.sh: srun started $tasks tasks on $nodes nodes, but torchrun starts the ranks of a node itself: give" \
      "srun --ntasks-per-node=1, or start train_ds.py without torchrun.sh" >&2
    exit 2
  fi
  if [ "$nodes" -gt 1 ]; then
    NNODES=$nodes NODE_RANK=$SLURM_NODEID
    read -r host port < <(of_job "$SLURM_STEP_NODELIST" "$SLURM_JOB_ID.$SLURM_STEP_ID")
    MASTER_ADDR=${MASTER_ADDR:-$host} MASTER_PORT=${MASTER_PORT:-$port}
  fi
fi
ranks=${NPROC_PER_NODE:-}
if [ -z "$ranks" ]; then
  ranks=1 # without a GPU that can be used too: train_ds.py says then what is wrong with it
  if [ "${DS_ACCELERATOR:-cuda}" != cpu ] && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    ranks=gpu
  fi
fi
unset RANK WORLD_SIZE LOCAL_RANK # of whatever started this script

if [ "${NNODES:-1}" -le 1 ]; then
  exec torchrun --standalone --nproc_per_node "$ranks" train_ds.py "$@"
fi
for name in NODE_RANK MASTER_ADDR; do
  [ -n "${!name:-}" ] || { echo "torchrun.sh: NNODES is $NNODES, but $name is not set" >&2; exit 2; }
done
MASTER_PORT=${MASTER_PORT:-29500}
if [ "$NODE_RANK" -eq 0 ]; then
  "$PYTHON" -c 'import sys
from higgs_ds.distributed.ports import free_port, taken
port = int(sys.argv[1])
try:
    free_port(port)
except OSError:
    sys.exit(taken(port))' "$MASTER_PORT" || exit 2
fi
exec torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
  --nproc_per_node "$ranks" train_ds.py "$@"
