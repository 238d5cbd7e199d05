#!/bin/sh
# The CIFAR-10 benchmark: pretraining, then k-NN, linear classification and fine-tuning, each beside
# the same model untrained, and a table at the end. It takes little more than an hour on 2 CPU cores.
# The same command continues where it stopped.
#
#   sh tools/cifar10.sh /path/to/cifar10 output/cifar10
#
# The first folder holds train/ and val/ with a folder of images per class, or
# cifar-10-binary.tar.gz. These variables make it shorter:
#   PRETRAIN_EPOCHS  epochs of pretraining, at least 2; default 16
#   EVAL_EPOCHS      epochs of linear classification and of fine-tuning; default 10
#   SUBSET           training images of fine-tuning, a fixed choice; default 10000
set -eu
export NGPU="${NGPU:-1}"  # the recipes' batch sizes are for one process
[ $# -eq 2 ] || { echo "error: usage: sh tools/cifar10.sh DATA OUTPUT" >&2; exit 2; }
root=$(dirname "$0")/..
. "$root/util/launch.sh"
data=$1
output=$2
dataset=cifar10
if [ -d "$data/train" ]; then dataset=folder; fi
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-16}
EVAL_EPOCHS=${EVAL_EPOCHS:-10}
SUBSET=${SUBSET:-10000}

# run STAGE CONFIG FOLDER ARGUMENTS...
run() {
  stage=$1
  config=$root/cfgs/$2/ViT-Ti_CIFAR10.yaml
  folder=$output/$3
  shift 3
  sh "$root/run_$stage.sh" --config "$config" --dataset $dataset --data_path "$data" \
    --output_dir "$folder" "$@"
}

run pretrain pretrain pretrain --epochs "$PRETRAIN_EPOCHS"
weights=$output/pretrain/model.safetensors
run knn finetune knn --finetune "$weights"
run knn finetune knn_untrained --finetune random --class_tokens 1
run lincls lincls lincls --finetune "$weights" --epochs "$EVAL_EPOCHS"
run lincls lincls lincls_untrained --finetune random --class_tokens 1 --epochs "$EVAL_EPOCHS"
run finetune finetune finetune --finetune "$weights" --epochs "$EVAL_EPOCHS" --subset "$SUBSET"
run finetune finetune finetune_untrained --class_tokens 1 --layer_decay 1 \
  --epochs "$EVAL_EPOCHS" --subset "$SUBSET"

choose_python "$root"
"$PYTHON" "$root/tools/results_table.py" "$output"
