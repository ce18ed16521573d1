#!/usr/bin/env bash
# Ablation: all mask strategies at decoder depth 4. Settings: see scripts/sweep.sh, as in
#   EPOCHS=200 SEEDS="1 2" scripts/ablate_mask_strategy.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
source scripts/sweep.sh
plan 4:random 4:block 4:grid 4:shifted_grid 4:blockwise
run_all
