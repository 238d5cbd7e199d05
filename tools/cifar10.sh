#!/bin/sh
# The CIFAR-10 benchmark: pretraining, then k-NN, linear classification and fine-tuning, each beside the same model
# untrained, ending in a table. Little more than an hour on 2 CPU cores; the same command goes on where it stopped.
#
#   sh tools/cifar10.sh /path/to/cifar10 output/cifar10
#
# The first folder holds train/ and val/ with a folder of images per class, or cifar-10-binary.tar.gz. A shorter form:
#   PRETRAIN_EPOCHS  of pretraining, at least 2; default 16
#   EVAL_EPOCHS      of linear classification and fine-tuning; default 10
#   SUBSET           training images of fine-tuning, a fixed choice; default 10000
set -eu
export NGPU="${NGPU:-1}"  # the recipes' batches are those of one process
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
  config=$2
  folder=$3
  shift 3
  sh "$root/run_$stage.sh" --config "$root/cfgs/$config/ViT-Ti_CIFAR10.yaml" --dataset $dataset --data_path "$data" \
    --output_dir "$output/$folder" "$@"
}

run pretrain pretrain pretrain --epochs "$PRETRAIN_EPOCHS"
weights=$output/pretrain/model.safetensors
run knn finetune knn --finetune "$weights"
run knn finetune knn_untrained --finetune random --class_token true
run lincls lincls lincls --finetune "$weights" --epochs "$EVAL_EPOCHS"
run lincls lincls lincls_untrained --finetune random --class_token true --epochs "$EVAL_EPOCHS"
run finetune finetune finetune --finetune "$weights" --epochs "$EVAL_EPOCHS" --subset "$SUBSET"
run finetune finetune finetune_untrained --class_token true --layer_decay 1 --epochs "$EVAL_EPOCHS" --subset "$SUBSET"

choose_python "$root"
"$PYTHON" "$root/tools/results_table.py" "$output"
