# Sourced by the ablations: settings, all environment variables, and how their runs are started.
EPOCHS=${EPOCHS:-2000}                   # of pretraining
FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-100}  # of each classifier
SEEDS=${SEEDS:-42 43 44}                 # each setting runs once a seed
DATASET=${DATASET:-cifar10}              # cifar10, cifar100, folder or shapes
DATA_DIR=${DATA_DIR:-data}
SIZE=${SIZE:-}                           # encoder, as in "--patch_size 4 --embed_dim 96 --encoder_depth 6"
PRETRAIN_FLAGS=${PRETRAIN_FLAGS:-}       # more for mae_pretrain.py, as in "--batch_size 256"
FINETUNE_FLAGS=${FINETUNE_FLAGS:-}       # more for train_classifier.py
LOGS=${LOGS:-logs/ablation}
JOBS=${JOBS:-}                           # at once; default: one a GPU, on a CPU 1. Each gets its share of the cores

python=.venv/bin/python
jobs=()

# plan SETTING ...: each is DEPTH:STRATEGY or scratch; one job a seed and setting, seeds outside, so that a sweep
# that is stopped early has whole seeds
plan() {
  local seed setting
  for seed in $SEEDS; do for setting in "$@"; do jobs+=("$seed:$setting"); done; done
}

run() {
  printf '+ python'
  printf ' %q' "$@"
  echo
  $python "$@"
}

# One job: pretrain, measure the features, fine-tune; or train from scratch. What is finished is passed over, what was
# stopped continues (a measurement starts again).
run_job() {
  local seed depth strategy model data=(--dataset "$DATASET" --data_dir "$DATA_DIR")
  IFS=: read -r seed depth strategy <<<"$1"
  if [ "$depth" = scratch ]; then
    run train_classifier.py "${data[@]}" $SIZE --total_epoch "$FINETUNE_EPOCHS" --seed "$seed" \
      --log_dir "$LOGS/classifier" $FINETUNE_FLAGS
    return
  fi
  model=$LOGS/encoders/d${depth}_${strategy}_ep${EPOCHS}_s$seed.pt
  run mae_pretrain.py "${data[@]}" $SIZE --decoder_depth "$depth" --mask_strategy "$strategy" --total_epoch "$EPOCHS" \
    --seed "$seed" --log_dir "$LOGS/pretrain" --model_path "$model" $PRETRAIN_FLAGS &&
    run evaluate_features.py --model_path "$model" --data_dir "$DATA_DIR" --layers all &&
    run train_classifier.py "${data[@]}" --total_epoch "$FINETUNE_EPOCHS" --seed "$seed" --pretrained_model_path "$model" \
      --log_dir "$LOGS/classifier" $FINETUNE_FLAGS
}

# One worker: takes job after job that no other has taken; after a failure nobody takes a new one.
work() {
  local i
  for i in "${!jobs[@]}"; do
    if [ -e "$taken/failed" ]; then return 1; fi
    mkdir "$taken/$i" 2>/dev/null || continue
    echo "[$((i + 1)) of ${#jobs[@]}] ${jobs[i]}"
    run_job "${jobs[i]}" || {
      touch "$taken/failed"
      echo "Stopped at ${jobs[i]}; the same command continues." >&2
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

# All jobs, by one worker or by several at a time, each on a GPU or on its share of the cores.
run_all() {
  local gpus count cores worker failed=0
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
