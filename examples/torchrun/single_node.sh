#!/usr/bin/env bash
# KTO on one machine: a torchrun that starts one rank per GPU.
#   MODEL=... DATA=... RESULTS=... ./single_node.sh model.optim.lr=1e-6
# Arguments are overrides of nemo-kto train. The same command goes on where an earlier run was stopped.
set -euo pipefail
: "${MODEL:?a Hugging Face directory, a Megatron checkpoint or a .nemo}"
: "${DATA:?training data: one file, or several with commas between}"
: "${RESULTS:?directory for metrics and checkpoints}"
DATA=${DATA//, /,}
PYTHON=${PYTHON:-python}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}  # GPUs of this machine
LAYOUT=${LAYOUT-8gpu}               # TP x PP x DP: a file of conf/layout; empty: none, the overrides say it

# Ctrl-C and SIGTERM: a rank ends its step and saves; torchrun would kill it after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-600}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$RANKS_PER_NODE" \
  -m nemo_kto.cli.main train ${LAYOUT:+"layout=$LAYOUT"} "pretrained_checkpoint.restore_from_path=\"$MODEL\"" \
  "model.data.data_prefix.train=[\"${DATA//,/\",\"}\"]" "exp_manager.explicit_log_dir=\"$RESULTS\"" "$@"
