#!/usr/bin/env bash
# Ablation: all mask strategies at decoder depth 4. Settings: see scripts/sweep.sh, as in
#   EPOCHS=200 SEEDS="1 2" scripts/ablate_mask_strategy.sh
export STRATEGIES=${STRATEGIES:-random block grid shifted_grid blockwise}
exec "$(dirname "$0")/sweep.sh"
