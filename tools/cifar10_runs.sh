# Sourced by cifar10.sh and cifar10_options.sh (POSIX sh), whose arguments are DATA OUTPUT: says what
# the data set is, and runs the stages with the recipes of CIFAR-10.
[ $# -eq 2 ] || { echo "error: usage: sh tools/$(basename "$0") DATA OUTPUT" >&2; exit 2; }
export NGPU="${NGPU:-1}"  # the recipes' batch sizes are for one process
root=$(dirname "$0")/..
. "$root/util/launch.sh"
data=$1
output=$2
dataset=cifar10
if [ -d "$data/train" ]; then dataset=folder; fi

# run STAGE CONFIG FOLDER ARGUMENTS...
run() {
  stage=$1
  config=$root/cfgs/$2/ViT-Ti_CIFAR10.yaml
  folder=$output/$3
  shift 3
  sh "$root/run_$stage.sh" --config "$config" --dataset $dataset --data_path "$data" \
    --output_dir "$folder" "$@"
}
