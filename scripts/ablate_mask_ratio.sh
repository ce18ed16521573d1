#!/usr/bin/env bash
# Ablation: mask ratios as in figure 5 of the MAE paper. Flags of python -m scripts.sweep may follow, and replace these:
#   scripts/ablate_mask_ratio.sh --total_epoch 200 --seed 1 2 --mask_ratio 0.5 0.75 0.9
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh >&2
ratios="0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.75 0.8 0.9"
exec .venv/bin/python -m scripts.sweep --mask_ratio $ratios --seed 42 43 44 --log_dir logs/ablation "$@"
