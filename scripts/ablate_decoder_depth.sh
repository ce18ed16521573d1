#!/usr/bin/env bash
# Ablation: decoder depth 2, 4, 8 under random masks. Settings: see scripts/sweep.sh, as in
#   EPOCHS=200 SEEDS="1 2" scripts/ablate_decoder_depth.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
source scripts/sweep.sh
plan 2:random 4:random 8:random
run_all
