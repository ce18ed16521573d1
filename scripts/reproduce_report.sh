#!/usr/bin/env bash
# Both ablations, the classifiers from scratch and the report: logs/report/REPORT.md. Runs that the ablations share are
# run once. Settings: see scripts/sweep.sh, and REPORT, the directory that is written; at toy size (3 minutes)
#   QUICK=1 scripts/reproduce_report.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${QUICK:-}" ]; then
  EPOCHS=${EPOCHS:-2} FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-2} SEEDS=${SEEDS:-1 2} DATASET=${DATASET:-shapes}
  JOBS=${JOBS:-2}
  SIZE=${SIZE:---patch_size 8 --embed_dim 32 --encoder_depth 2 --num_heads 2}
  PRETRAIN_FLAGS=${PRETRAIN_FLAGS:---batch_size 100 --base_learning_rate 4e-3}
  FINETUNE_FLAGS=${FINETUNE_FLAGS:---batch_size 100 --base_learning_rate 4e-3 --train_images 1000}
  LOGS=${LOGS:-logs/quick_ablation} REPORT=${REPORT:-logs/quick_report}
fi
scripts/setup.sh >&2
source scripts/sweep.sh
SCRATCH=1
DEPTHS="4 2 8" STRATEGIES=random plan
DEPTHS=4 STRATEGIES="random block grid shifted_grid blockwise" plan
run_all
if [ -z "$DRY" ]; then run -m scripts.make_report --runs "$LOGS" --output "${REPORT:-logs/report}"; fi
