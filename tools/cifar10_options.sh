#!/bin/sh
# Options of pretraining on CIFAR-10, each alone beside the recipe as it is and beside random
# weights: pretrains, evaluates the frozen encoders, and prints a table.
# The same command continues where it stopped.
#
#   sh tools/cifar10_options.sh /path/to/cifar10 output/cifar10_options
#
# The first folder holds train/ and val/ with a folder of images per class, or
# cifar-10-binary.tar.gz. These variables make it shorter:
#   OPTIONS  which options; default all: recipe block2 green grid tokens8 fusion3 lowpass visible
#            muon random
#   SEEDS    default "0 1"
#   EPOCHS   epochs of pretraining, at least 2; default 8
#   SUBSET   training images of the linear and the attentive probe, a fixed choice; default 10000
#   PROBE    epochs of the attentive probe; default 10
#   ROUNDS   rounds in which every option pretrains on the 4,000 digits of mnist5k for two epochs, in
#            turn, for the times of a step; default 0, as nothing else should run meanwhile
set -eu
. "$(dirname "$0")/cifar10_runs.sh"
OPTIONS=${OPTIONS:-recipe block2 green grid tokens8 fusion3 lowpass visible muon random}
SEEDS=${SEEDS:-0 1}
EPOCHS=${EPOCHS:-8}
SUBSET=${SUBSET:-10000}
PROBE=${PROBE:-10}

# arguments_of OPTION
arguments_of() {
  case $1 in
    recipe) ;;
    block2) echo --mask block --mask_block 2 ;;
    green | grid) echo --mask "$1" ;;
    tokens8) echo --class_tokens 8 ;;
    fusion3) echo --decoder_fusion 3 ;;
    lowpass) echo --target lowpass --crop simple ;;
    visible) echo --visible_weight 0.1 ;;
    muon) echo --optimizer muon ;;
    *) fail "OPTIONS has no '$1'" ;;
  esac
}

# finish STAGE CONFIG FOLDER ARGUMENTS...: runs what has no results yet
finish() {
  [ -e "$output/$3/results.json" ] || run "$@"
}

for option in $OPTIONS; do  # before any compute
  [ "$option" = random ] || arguments_of "$option" >/dev/null
done
for seed in $SEEDS; do
  for option in $OPTIONS; do
    runs=$option/seed$seed
    if [ "$option" = random ]; then
      set -- --finetune random --class_tokens 1 --seed "$seed"
    else
      arguments=$(arguments_of "$option")
      # shellcheck disable=SC2086
      run pretrain pretrain "$runs/pretrain" --epochs "$EPOCHS" --warmup_epochs 1 \
        --monitor_epochs 0 --seed "$seed" $arguments
      set -- --finetune "$output/$runs/pretrain/model.safetensors" --seed "$seed"
    fi
    finish knn finetune "$runs/knn" "$@" --ks 10 --layer 0 1 2 3 4 5
    set -- "$@" --subset "$SUBSET"
    finish lincls lincls "$runs/linear" "$@" --optimizer lbfgs
    finish lincls lincls "$runs/attentive" "$@" --probe attentive --epochs "$PROBE"
  done
done

round=0
while [ $round -lt "${ROUNDS:-0}" ]; do
  round=$((round + 1))
  for option in $OPTIONS; do
    [ "$option" != random ] || continue
    arguments=$(arguments_of "$option")
    # shellcheck disable=SC2086
    run pretrain pretrain "times/$round/$option" --dataset mnist5k --epochs 2 --warmup_epochs 1 \
      --monitor_epochs 0 --log_interval 4 $arguments
  done
done

choose_python "$root"
# shellcheck disable=SC2086
"$PYTHON" "$root/tools/options_table.py" "$output" $OPTIONS
