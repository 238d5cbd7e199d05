# Sourced by the run_*.sh launchers (POSIX sh): starts one entry script on the processes that the
# environment asks for.
#
#   NGPU         processes on this machine; default: one per CUDA device, or one on the CPU
#   NNODES       machines, default 1. Several need NODE_RANK (0 to NNODES - 1) and MASTER_ADDR (host
#                name of node 0), and take MASTER_PORT (default 29500). LEAST:MOST, as 1:2, goes on
#                without machines that are lost and with those that come back; it needs no
#                NODE_RANK, and does not survive the loss of the machine MASTER_ADDR
#   MAX_RESTARTS how often all processes are started again after one has died or a machine was lost;
#                default 0, and 3 with LEAST:MOST
#   PYTHON       interpreter; default: that of the active environment (venv or conda, whose base
#                does not count, as it is active in every shell), else .venv beside the launcher,
#                else python3

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
    active=${VIRTUAL_ENV:-}${CONDA_PREFIX:-}
    [ "${CONDA_DEFAULT_ENV:-}" != base ] || active=${VIRTUAL_ENV:-}
    if [ -z "$active" ] && [ -x "$1/.venv/bin/python" ]; then
      PYTHON="$1/.venv/bin/python"
    fi
  fi
}

# torchrun FOLDER ARGUMENTS...: in place of this shell
torchrun() {
  folder=$1
  shift
  # Signals go on to all processes, which stop at the next step and save. Under nohup the end of a
  # session is no reason to stop.
  hangup=$("$PYTHON" -c 'import signal as s
print("" if s.getsignal(s.SIGHUP) == s.SIG_IGN else ",SIGHUP")')
  # A store for each start: the launcher keeps addresses of processes that ended (torch 2.14.1).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # Seconds that the processes have to save their state.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
  # What torchrun sets for several processes, with a warning.
  [ "$NGPU" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  # -P: the modules of util/ are not to be found by their bare names.
  exec "$PYTHON" -P "$folder/util/launch.py" --nproc_per_node "$NGPU" \
    --signals_to_handle "SIGTERM,SIGINT,SIGQUIT,SIGUSR1$hangup" "$@"
}

# launch FOLDER SCRIPT ARGUMENTS...
launch() {
  root=$1
  script="$1/$2"
  choose_python "$root"
  shift 2
  for argument in "$@"; do  # an answer at once, as counting devices takes seconds
    case $argument in
      -h | --help | --print_config) exec "$PYTHON" "$script" "$@" ;;
    esac
  done

  if [ -z "${NGPU:-}" ]; then
    NGPU=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 1)') ||
      fail "$PYTHON has no torch"
  fi
  NNODES=${NNODES:-1}
  least=${NNODES%%:*}
  most=${NNODES#*:}
  whole_number NGPU "$NGPU"
  whole_number NNODES "$least"
  whole_number NNODES "$most"
  whole_number MAX_RESTARTS "${MAX_RESTARTS:-0}"
  [ "$NGPU" -ge 1 ] || fail "NGPU must be at least 1"
  [ "$least" -ge 1 ] && [ "$least" -le "$most" ] ||
    fail "NNODES must be a number from 1, or LEAST:MOST, got '$NNODES'"
  [ "$NNODES" != "$most" ] || [ "$NNODES" = 1 ] || whole_number NODE_RANK "${NODE_RANK:-}"
  [ "$NNODES" = 1 ] || [ -n "${MASTER_ADDR:-}" ] ||
    fail "NNODES=$NNODES needs MASTER_ADDR, the host name of node 0"
  port=${MASTER_PORT:-29500}

  if [ "$NNODES" != "$most" ]; then
    torchrun "$root" --nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$port" \
      --max_restarts "${MAX_RESTARTS:-3}" "$script" "$@"
  elif [ "$NNODES" -gt 1 ]; then
    [ "${MAX_RESTARTS:-0}" -eq 0 ] ||
      fail "MAX_RESTARTS on several machines needs NNODES=$NNODES:$NNODES"
    torchrun "$root" --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
      --master_port "$port" "$script" "$@"
  elif [ "$NGPU" -gt 1 ] || [ "${MAX_RESTARTS:-0}" -gt 0 ]; then
    # They meet in a file: what listens on a port does so on all interfaces.
    torchrun "$root" --nnodes 1 --rdzv_backend c10d --rdzv_conf store_type=file \
      --max_restarts "${MAX_RESTARTS:-0}" "$script" "$@"
  else
    exec "$PYTHON" "$script" "$@"
  fi
}
