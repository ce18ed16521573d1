#!/usr/bin/env bash
# Both ablations, the classifiers from scratch and the report: logs/report/REPORT.md. Flags of python -m scripts.sweep
# may follow. LOGS: where the runs are made; REPORT: the directory that is written. At toy size
#   QUICK=1 scripts/reproduce_report.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh >&2
flags=(--seed 42 43 44)
if [ -n "${QUICK:-}" ]; then
  LOGS=${LOGS:-logs/quick_ablation} REPORT=${REPORT:-logs/quick_report}
  recipe="--total_epoch 2 --batch_size 100 --base_learning_rate 4e-3"
  flags=(--dataset shapes --patch_size 8 --embed_dim 32 --encoder_depth 2 --num_heads 2 $recipe --seed 1 2 --jobs 2)
  flags+=(--finetune "$recipe --train_images 1000")
fi
sweep() { .venv/bin/python -m scripts.sweep "${flags[@]}" --log_dir "${LOGS:=logs/ablation}" "$@"; }
sweep --decoder_depth 4 --mask_strategy all --scratch "$@"
sweep --decoder_depth 2 8 --mask_strategy random cells "$@"
if [[ " $* " != *" --list "* ]]; then
  .venv/bin/python -m scripts.report "$LOGS" --output "${REPORT:-logs/report}"
fi
