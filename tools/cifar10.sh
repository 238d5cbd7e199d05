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
. "$(dirname "$0")/cifar10_runs.sh"
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-16}
EVAL_EPOCHS=${EVAL_EPOCHS:-10}
SUBSET=${SUBSET:-10000}

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
