#!/usr/bin/env bash
# Ablation: all mask strategies at decoder depth 4. Flags of python -m scripts.sweep may follow, and replace these:
#   scripts/ablate_mask_strategy.sh --total_epoch 200 --seed 1 2
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh >&2
exec .venv/bin/python -m scripts.sweep --mask_strategy all --seed 42 43 44 --log_dir logs/ablation "$@"
