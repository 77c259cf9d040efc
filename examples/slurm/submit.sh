#!/usr/bin/env bash
# Prepare, train, export: three jobs, each started when the one before it has succeeded.
#   MODEL=... DATA=... RESULTS=... ./submit.sh --account=ACCOUNT --partition=PARTITION -- model.optim.lr=1e-6
# Before -- are sbatch's options, for all three; after it overrides of nemo-kto train.
# TRAIN_SCRIPT=kto_srun.sbatch takes the other way to start ranks. TRAIN_OPTIONS, EXPORT_OPTIONS: more sbatch options
# for one job, such as TRAIN_OPTIONS="--nodes=8".
set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
(($# == 0)) || shift
read -ra train_options <<<"${TRAIN_OPTIONS:-}"
read -ra export_options <<<"${EXPORT_OPTIONS:-}"
here=$(dirname "$(realpath "$0")")

submit() {  # sbatch with the common options; prints the job's number
  sbatch --parsable --kill-on-invalid-dep=yes ${options[@]+"${options[@]}"} "$@" | cut -d ';' -f 1
}
prepare=$(submit "$here/prepare.sbatch")
train=$(submit --dependency=afterok:"$prepare" ${train_options[@]+"${train_options[@]}"} \
  "$here/${TRAIN_SCRIPT:-kto.sbatch}" "$@")
export=$(submit --dependency=afterok:"$train" ${export_options[@]+"${export_options[@]}"} "$here/export.sbatch")
echo "prepare $prepare, train $train, export $export"
