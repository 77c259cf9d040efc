#!/usr/bin/env bash
# Prepare, train, export: three jobs, each started when the one before it has succeeded.
#   MODEL=... DATA=... RESULTS=... ./submit.sh --account=ACCOUNT --partition=PARTITION -- model.optim.lr=1e-6
# Before -- are sbatch's options, for all three; after it overrides of nemo-kto train.
# Those that change the tokens also go to prepare.sbatch; LoRA is exported as adapters, unless EXPORT_ARGS is set, to
# options of nemo-kto convert megatron-to-hf such as --merge.
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
prepare_args=() export_args=()
for word in "$@"; do
  case $word in
    model.data.seq_length=*) prepare_args+=(--seq-length "${word#*=}") ;;
    model.data.overlong=*) prepare_args+=(--overlong "${word#*=}") ;;
    model.data.append_eos=[Ff]alse) prepare_args+=(--no-append-eos) ;;
    model.peft.peft_scheme=lora) export_args=(--adapter) ;;
  esac
done
[[ -z ${EXPORT_ARGS:-} ]] || read -ra export_args <<<"$EXPORT_ARGS"
here=$(dirname "$(realpath "$0")")

submit() {  # sbatch with the common options; prints the job's number
  sbatch --parsable --kill-on-invalid-dep=yes ${options[@]+"${options[@]}"} "$@" | cut -d ';' -f 1
}
prepare=$(submit "$here/prepare.sbatch" \
  ${prepare_args[@]+"${prepare_args[@]}"})
train=$(submit --dependency=afterok:"$prepare" ${train_options[@]+"${train_options[@]}"} \
  "$here/${TRAIN_SCRIPT:-kto.sbatch}" "$@")
export=$(submit --dependency=afterok:"$train" ${export_options[@]+"${export_options[@]}"} "$here/export.sbatch" \
  ${export_args[@]+"${export_args[@]}"})
echo "prepare $prepare, train $train, export $export"
