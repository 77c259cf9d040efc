#!/usr/bin/env bash
# KTO on several machines, with restarts: if a rank dies, all ranks start again from the newest checkpoint. Run the
# same command on every machine; HEAD, one of them, is where they meet:
#   HEAD=node1 NODES=4 MODEL=... DATA=... RESULTS=... ./elastic.sh trainer.kto.save_interval=50
# A machine that was lost may come back: run the command there again while the others wait for it. NODES=2:4 also goes
# on with fewer, if the layout fits: data parallelism takes what TP x PP leaves.
# Exit code 4: stopped early, by SIGTERM or exp_manager.max_time_per_run; the same command goes on from there.
set -euo pipefail
: "${MODEL:?a Hugging Face directory, a Megatron checkpoint or a .nemo}"
: "${DATA:?training data: one file, or several with commas between}"
: "${RESULTS:?directory for metrics and checkpoints}"
: "${HEAD:?name or address of one of the machines, as all see it}"
: "${NODES:?number of machines, or fewest:most}"
PORT=${PORT:-29500}      # free on HEAD, and open to the others
RUN_ID=${RUN_ID:-kto}    # the same on all machines, another one for each run
MAX_RESTARTS=${MAX_RESTARTS:-3}  # a run that fails for a reason of its own is also tried so often
DATA=${DATA//, /,}
PYTHON=${PYTHON:-python}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}  # GPUs of each machine
LAYOUT=${LAYOUT-32gpu}              # TP x PP x DP: a file of conf/layout; empty: none, the overrides say it

# With another program on that port torchrun would wait without a word. Another machine's torchrun is welcome there.
taken() { timeout 5 bash -c ": 3<>/dev/tcp/$HEAD/$PORT" && ! "$PYTHON" -c "
import signal, torch.distributed
signal.alarm(20)
torch.distributed.TCPStore('$HEAD', $PORT, is_master=False)"; }
if { taken; } 2>/dev/null; then
  echo "error: PORT=$PORT is in use on $HEAD, and not by torchrun: give all machines another PORT" >&2
  exit 2
fi
export NEMO_KTO_CACHE=${NEMO_KTO_CACHE:-$RESULTS/cache}     # tokens, made once for all ranks
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-600}  # for a step and its checkpoint after SIGTERM
# Without it, restarted ranks find the addresses of those before them in torchrun's store, and fail. c10d alone has it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Ranks that have stopped early end with 0, which torchrun does not answer with a restart, and leave a note.
note=$(mktemp -u)
export NEMO_KTO_REQUEUE_FILE=${NEMO_KTO_REQUEUE_FILE:-$note}
"$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS_PER_NODE" \
  --max-restarts="$MAX_RESTARTS" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$RUN_ID" \
  --rdzv-conf="keep_alive_interval=5,keep_alive_max_attempt=3,join_timeout=${REJOIN_SECONDS:-600}" \
  -m nemo_kto.cli.main train ${LAYOUT:+"layout=$LAYOUT"} "pretrained_checkpoint.restore_from_path=\"$MODEL\"" \
  "model.data.data_prefix.train=[\"${DATA//,/\",\"}\"]" "exp_manager.explicit_log_dir=\"$RESULTS\"" "$@" &
torchrun=$! code=0
trap 'kill -TERM "$torchrun"' TERM INT HUP
while wait "$torchrun" || code=$?; kill -0 "$torchrun" 2>/dev/null; do code=0; done
[[ ! -e $NEMO_KTO_REQUEUE_FILE ]] || code=4
rm -f "$note"
exit "$code"
