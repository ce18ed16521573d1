#!/usr/bin/env bash
# Ablation: decoder depth 2, 4, 8 under random masks. Settings: see scripts/sweep.sh, as in
#   EPOCHS=200 SEEDS="1 2" scripts/ablate_decoder_depth.sh
export DEPTHS=${DEPTHS:-2 4 8}
exec "$(dirname "$0")/sweep.sh"
