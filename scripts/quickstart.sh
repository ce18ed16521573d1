#!/usr/bin/env bash
# From a fresh clone to pictures: pretrain a small MAE on drawn shapes, train a classifier from its encoder and from
# scratch, look at both. No download but the packages. The same again continues what was stopped and passes over what
# is finished. SEED=2 scripts/quickstart.sh repeats it with other draws.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
SEED=${SEED:-42}
out=logs/quickstart/seed$SEED
size="--patch_size 4 --embed_dim 64 --encoder_depth 4 --num_heads 4"
finetune="--dataset shapes --train_images 2000 --total_epoch 12 --batch_size 50 --base_learning_rate 5e-3
  --seed $SEED --log_dir $out/classifier"

say() { printf '\n%s\n' "$*"; }
run() {
  echo "+ python $*"
  .venv/bin/python "$@"
}

say "1. Pretrain: hide 75 % of each image, predict it from the rest"
run mae_pretrain.py --dataset shapes $size --decoder_depth 1 --total_epoch 30 --batch_size 32 \
  --optimizer muon --base_learning_rate 1.6e-2 --seed "$SEED" --log_dir $out/pretrain --output_model_path $out/mae.pt
say "2. What it learned without labels: classify by the frozen features, of this encoder and of an untrained one" \
  "(look at the linear probe: shapes hide their class from k-NN)"
run evaluate_features.py --model_path $out/mae.pt --untrained --pool mean --train_images 2000
say "3. Train a classifier from the pretrained encoder"
run train_classifier.py $finetune --pretrained_model_path $out/mae.pt --output_model_path $out/pretrained.pt
say "4. The same from scratch"
run train_classifier.py $finetune $size --output_model_path $out/scratch.pt
say "5. Look"
run visualize_predictions.py --masks --output $out/masks.png
run visualize_predictions.py --model_path $out/mae.pt
run visualize_predictions.py --model_path $out/pretrained.pt
run -m scripts.plot_curves $out/classifier/*from_mae* $out/classifier/*scratch* \
  --label "pretrained" "from scratch" --output $out/curves.png

cat <<END

Test accuracy is in the two lines above. Pictures: $out/*.png
Next:
  .venv/bin/python visualize_predictions.py --model_path $out/mae.pt --mask_strategy block
  .venv/bin/tensorboard --logdir $out
  .venv/bin/python mae_pretrain.py --help          the full CIFAR-10 experiment is its defaults
END
