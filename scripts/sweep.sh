#!/usr/bin/env bash
# A sweep: for every combination of what varies, and every seed, pretrain a MAE, measure its features, fine-tune it.
#   RATIOS="0.5 0.75 0.9" SEEDS="1 2 3" scripts/sweep.sh
#   STRATEGIES="random block" DEPTHS="2 4" scripts/sweep.sh                 # 4 settings
#   VARY="embed_dim=96,192 norm_pix_loss=off,on" scripts/sweep.sh           # any flags: 4 settings
#   LABELS="100 1000" FINETUNE_FLAGS="--batch_size 50" scripts/sweep.sh     # accuracy by number of labels
#   DRY=1 RATIOS="0.5 0.75 0.9" scripts/sweep.sh >jobs.txt                  # only list the jobs, a line each
# These run such a list on a cluster, or two jobs at a time on this machine:
#   sbatch --array=1-$(wc -l <jobs.txt) --gres=gpu:1 --wrap 'eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" jobs.txt)"'
#   tr '\n' '\0' <jobs.txt | xargs -0 -n 1 -P 2 bash -c
# The same command again passes over what is finished and continues what was stopped. Settings, all environment
# variables:
STRATEGIES=${STRATEGIES:-}               # mask strategies to try
DEPTHS=${DEPTHS:-}                       # decoder depths
RATIOS=${RATIOS:-}                       # mask ratios
PATCH_SIZES=${PATCH_SIZES:-}
VARY=${VARY:-}                           # other flags of mae_pretrain.py, each with values to try
LABELS=${LABELS:-}                       # numbers of labelled images to fine-tune on, and to fit the linear probe on
SCRATCH=${SCRATCH:-}                     # 1: train classifiers from scratch, too
EPOCHS=${EPOCHS:-2000}                   # of pretraining
FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-100}  # of each classifier; 0: no classifiers
SEEDS=${SEEDS:-42 43 44}                 # each setting runs once a seed
DATASET=${DATASET:-cifar10}              # as --dataset of mae_pretrain.py, with labels
DATA_DIR=${DATA_DIR:-data}
SIZE=${SIZE:-}                           # encoder, as in "--patch_size 4 --embed_dim 96 --encoder_depth 6"
PRETRAIN_FLAGS=${PRETRAIN_FLAGS:-}       # more for mae_pretrain.py, as in "--batch_size 256"
FINETUNE_FLAGS=${FINETUNE_FLAGS:-}       # more for train_classifier.py
LOGS=${LOGS:-logs/ablation}
JOBS=${JOBS:-}                           # at once; default: one a GPU, on a CPU 1. Each gets its share of the cores
DRY=${DRY:-}                             # 1: print each job's commands in one line, and run nothing
export EPOCHS FINETUNE_EPOCHS SEEDS DATASET DATA_DIR SIZE PRETRAIN_FLAGS FINETUNE_FLAGS LABELS SCRATCH LOGS

python=.venv/bin/python
grids=() # each is flags of mae_pretrain.py and their values, as in "mask_ratio=0.5,0.9 decoder_depth=2,4"
jobs=()  # each is commands joined by &&

# Add every combination of what varies.
plan() {
  grids+=("$(values_of mask_strategy $STRATEGIES) $(values_of decoder_depth $DEPTHS) $(values_of mask_ratio $RATIOS) \
    $(values_of patch_size $PATCH_SIZES) $VARY")
}

# values_of mask_ratio 0.5 0.9: mask_ratio=0.5,0.9; without values nothing
values_of() {
  local IFS=, flag=$1
  shift
  echo "${1:+$flag=$*}"
}

# Make jobs of what is planned, each setting once a seed; wrong flags end here.
list_jobs() {
  local lines start=run
  if [ -n "$DRY" ]; then start=$python; fi
  lines=$(START=$start $python -m scripts.sweep_jobs "${grids[@]}") || return
  while IFS= read -r line; do jobs+=("$line"); done <<<"$lines"
}

run() {
  printf '+ python'
  printf ' %q' "$@"
  echo
  $python "$@"
}

# One worker: takes job after job that no other has taken; after a failure nobody takes a new one.
work() {
  local i
  for i in "${!jobs[@]}"; do
    if [ -e "$taken/failed" ]; then return 1; fi
    mkdir "$taken/$i" 2>/dev/null || continue
    echo "[$((i + 1)) of ${#jobs[@]}]"
    eval "${jobs[i]}" || {
      touch "$taken/failed"
      echo "Stopped at job $((i + 1)) of ${#jobs[@]}; the same command continues." >&2
      return 1
    }
  done
}

# Pass a signal on to what the workers run, and leave when that has been saved.
stop() {
  touch "$taken/failed"
  pkill -TERM -P "$(IFS=, && echo "${workers[*]}")" || true
  wait
  exit 130
}

# All jobs, by one worker or by several at a time, each on a GPU or on its share of the cores; or only their list.
run_all() {
  local gpus count cores worker failed=0
  list_jobs || return
  if [ -n "$DRY" ]; then printf '%s\n' "${jobs[@]}" && return; fi
  gpus=(${CUDA_VISIBLE_DEVICES-$({ nvidia-smi -L 2>/dev/null || true; } | sed -n 's/^GPU \([0-9]*\):.*/\1/p')})
  IFS=', ' read -r -a gpus <<<"${gpus[*]:-}"
  count=${JOBS:-$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))}
  if ((count > 1)); then
    cores=$(($(getconf _NPROCESSORS_ONLN) / count))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
  fi
  taken=$(mktemp -d) workers=()
  trap 'rm -rf "$taken"' EXIT
  trap stop INT TERM
  for ((worker = 0; worker < count; worker++)); do
    if ((${#gpus[@]})); then export CUDA_VISIBLE_DEVICES=${gpus[worker % ${#gpus[@]}]}; fi
    work &
    workers+=($!)
  done
  for worker in "${workers[@]}"; do wait "$worker" || { failed=1 && touch "$taken/failed"; }; done
  trap - INT TERM
  return $failed
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  cd "$(dirname "$0")/.."
  scripts/setup.sh >&2
  plan
  run_all
fi
