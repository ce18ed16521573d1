#!/usr/bin/env bash
# Ablation: mask ratios from 0.1 to 0.9, as in figure 5 of the MAE paper. Settings: see scripts/sweep.sh, as in
#   EPOCHS=200 SEEDS="1 2" RATIOS="0.5 0.75 0.9" scripts/ablate_mask_ratio.sh
export RATIOS=${RATIOS:-0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.75 0.8 0.9}
exec "$(dirname "$0")/sweep.sh"
