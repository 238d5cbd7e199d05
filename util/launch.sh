# Sourced by the run_*.sh launchers (POSIX sh): starts one entry script on the processes that the environment asks for.
#
#   NGPU         processes on this machine; default: one per CUDA device, or one on the CPU
#   NNODES       machines, default 1; more need NODE_RANK (0 to NNODES - 1) and MASTER_ADDR (host of node 0),
#                and take MASTER_PORT (default 29500)
#   PYTHON       interpreter; default: that of the active environment, else .venv beside the launcher, else python3
#
# Memory that a step frees stays with the process (glibc's MALLOC_* variables, unless they are set already): else every
# step on a CPU asks the system for it again, page by page.

fail() {
  echo "error: $1" >&2
  exit 2
}

whole_number() {
  case "$2" in
    '' | *[!0-9]*) fail "$1 must be a whole number, got '$2'" ;;
  esac
}

# choose_python FOLDER: sets PYTHON
choose_python() {
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$1/.venv/bin/python" ]; then PYTHON="$1/.venv/bin/python"; fi
  fi
}

# launch FOLDER SCRIPT ARGUMENTS...
launch() {
  script="$1/$2"
  choose_python "$1"
  shift 2

  if [ -z "${NGPU:-}" ]; then
    NGPU=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))') || fail "$PYTHON has no torch"
  fi
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" # 32 MiB, the most that glibc takes
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
  NNODES=${NNODES:-1}
  whole_number NGPU "$NGPU"
  whole_number NNODES "$NNODES"
  [ "$NGPU" -ge 1 ] || fail "NGPU must be at least 1"

  if [ "$NNODES" -gt 1 ]; then
    whole_number NODE_RANK "${NODE_RANK:-}"
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the host name of node 0"
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$NGPU" \
      --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$script" "$@"
  elif [ "$NGPU" -gt 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NGPU" "$script" "$@"
  else
    exec "$PYTHON" "$script" "$@"
  fi
}
