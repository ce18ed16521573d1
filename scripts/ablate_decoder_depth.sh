#!/usr/bin/env bash
# Ablation: decoder depth 2, 4, 8 under random masks. Flags of python -m scripts.sweep may follow, and replace these:
#   scripts/ablate_decoder_depth.sh --total_epoch 200 --seed 1 2
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh >&2
exec .venv/bin/python -m scripts.sweep --decoder_depth 2 4 8 --seed 42 43 44 --log_dir logs/ablation "$@"
