#!/bin/sh
# Pretrains on every GPU of this machine, or in one process on the CPU:
#   sh run_pretrain.sh --config cfgs/pretrain/Vit-S_100E_GAP.yaml --data_path /path/to/train/data
# util/launch.sh says how NGPU, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT choose the processes.
set -eu
here=$(dirname "$0")
. "$here/util/launch.sh"
launch "$here" main_pretrain.py "$@"
