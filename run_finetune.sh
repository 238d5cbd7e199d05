#!/bin/sh
# Fine-tunes on every GPU of this machine, or in one process on the CPU; without --finetune it
# trains from scratch:
#   sh run_finetune.sh --config cfgs/finetune/ViT-S_50E_GAP.yaml --data_path /path/to/data \
#     --finetune /path/to/pretrain/model
# util/launch.sh says how NGPU, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT choose the processes.
set -eu
here=$(dirname "$0")
. "$here/util/launch.sh"
launch "$here" main_finetune.py "$@"
