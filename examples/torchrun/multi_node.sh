#!/usr/bin/env bash
# KTO on several machines, whose number does not change. Run it on every machine, with its own NODE_RANK:
#   first:   HEAD=node1 NODES=4 NODE_RANK=0 MODEL=... DATA=... RESULTS=... ./multi_node.sh
#   others:  HEAD=node1 NODES=4 NODE_RANK=1 ... (2, 3)
# MODEL, DATA and RESULTS are on a file system that all of them see. If a rank dies, all end: run it again everywhere,
# and it goes on from the newest checkpoint. elastic.sh does that by itself.
set -euo pipefail
: "${MODEL:?a Hugging Face directory, a Megatron checkpoint or a .nemo}"
: "${DATA:?training data: one file, or several with commas between}"
: "${RESULTS:?directory for metrics and checkpoints}"
: "${HEAD:?name or address of the machine with NODE_RANK=0, as the others see it}"
: "${NODES:?number of machines}"
: "${NODE_RANK:?number of this machine, from 0}"
PORT=${PORT:-29500}  # free on HEAD, and open to the others
DATA=${DATA//, /,}
PYTHON=${PYTHON:-python}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}  # GPUs of each machine
LAYOUT=${LAYOUT-32gpu}              # TP x PP x DP: a file of conf/layout; empty: none, the overrides say it

if ((NODE_RANK == 0)) && (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; then
  echo "error: PORT=$PORT is in use on $HEAD: give all machines another PORT" >&2
  exit 2
fi
export NEMO_KTO_CACHE=${NEMO_KTO_CACHE:-$RESULTS/cache}     # tokens, made once for all ranks
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-600}  # for a step and its checkpoint after SIGTERM
exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE_RANK" \
  --nproc-per-node="$RANKS_PER_NODE" --master-addr="$HEAD" --master-port="$PORT" \
  -m nemo_kto.cli.main train ${LAYOUT:+"layout=$LAYOUT"} "pretrained_checkpoint.restore_from_path=\"$MODEL\"" \
  "model.data.data_prefix.train=[\"${DATA//,/\",\"}\"]" "exp_manager.explicit_log_dir=\"$RESULTS\"" "$@"
