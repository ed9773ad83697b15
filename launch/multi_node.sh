#!/usr/bin/env bash
# The ranks of all hosts of a hostfile, with DeepSpeed's launcher and the flags of train_ds.py.
#   from one of them, by pdsh and ssh without a password:  bash launch/multi_node.sh HOSTFILE --train_manifest … …
#   without ssh, on each of them:             NODE_RANK=0 bash launch/multi_node.sh HOSTFILE --train_manifest … …
# HOSTFILE has a line a host, `node01 slots=8`; the first host is rank 0's. The folder that this stands in is the same
# on all hosts. MASTER_ADDR: default the first host. MASTER_PORT: default 29500.
set -euo pipefail
[ $# -ge 1 ] && [ -f "$1" ] || { echo "usage: [NODE_RANK=K] bash launch/multi_node.sh HOSTFILE FLAG…" >&2; exit 2; }
hostfile=$(realpath "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")
[ -n "$first" ] || { echo "multi_node.sh: $hostfile names no host; give a line a host, as: node01 slots=8" >&2; exit 2; }
source launch/setup.sh

how=(--hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
  how+=(--no_ssh --node_rank "$NODE_RANK")
elif ! command -v pdsh >/dev/null; then
  echo "multi_node.sh: pdsh is not installed here; install it, or start this on each host with NODE_RANK=0, 1, …" >&2
  exit 2
fi
# pdsh's shells know nothing of this one: DeepSpeed hands on NCCL_* and what is in a file. Keys (WANDB_API_KEY, HF_TOKEN)
# would be seen by everybody who lists processes: log in on each host instead.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in DS_ACCELERATOR OMP_NUM_THREADS TOKENIZERS_PARALLELISM GLOO_SOCKET_IFNAME PYTORCH_CUDA_ALLOC_CONF HF_HOME \
  HF_HUB_OFFLINE WANDB_MODE WANDB_PROJECT WANDB_ENTITY; do
  if [ -n "${!name:-}" ]; then echo "$name=${!name}" >>"$DS_ENV_FILE"; fi
done
code=0
deepspeed "${how[@]}" train_ds.py "$@" || code=$?
exit "$code"
