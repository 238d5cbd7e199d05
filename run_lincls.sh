#!/bin/sh
# Trains linear classifiers on frozen features, on every GPU of this machine, or in one process on
# the CPU:
#   sh run_lincls.sh --config cfgs/lincls/ViT-S_SGD_GAP.yaml --data_path /path/to/data \
#     --finetune /path/to/pretrain/model
# util/launch.sh says how NGPU, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT choose the processes.
set -eu
here=$(dirname "$0")
. "$here/util/launch.sh"
launch "$here" main_lincls.py "$@"
