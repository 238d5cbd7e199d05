"""`tools/slurm/pretrain.sbatch` with stand-ins for srun and scontrol: two nodes are two launchers
on this machine."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT
from runs import digits, environment, log_lines, run, saved_step

from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

SBATCH = ROOT / "tools" / "slurm" / "pretrain.sbatch"
# Starts the command once per node, on as many cores as it is told, or one, and forwards SIGTERM, as
# srun does; ends with the worst exit code.
SRUN = """#!/bin/bash
cores=1
while [[ $1 == --* ]]; do
  [[ $1 != --cpus-per-task=* ]] || cores=${1#*=}
  shift
done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NODEID=$node taskset -c "$(echo $CORES | cut -d , -f "-$cores")" "$@" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
for pid in "${pids[@]}"; do
  wait "$pid"; code=$?
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; code=$?; done
  [ $code -le ${worst:=0} ] || worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\n127.0.0.2\\n'
else echo "$*" >> "$SCONTROL_LOG"; fi
"""


@pytest.mark.long
def test_a_job_whose_time_is_up_saves_is_requeued_and_goes_on(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls, out, cores = tmp_path / "calls", tmp_path / "out", os.sched_getaffinity(0)
    place = {
        "PATH": f"{tmp_path}:{environment()['PATH']}",
        "SCONTROL_LOG": str(calls),
        "NGPU": "1",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": str(len(cores)),
        "CORES": ",".join(map(str, cores)),
        "SLURM_JOB_ID": str(time.time_ns() % 10000),
        "SLURM_JOB_NODELIST": "node[0-1]",
    }
    more = ["--batch_size", 32, "--log_interval", 1, "--epochs", 30]
    arguments = ["bash", str(SBATCH), *digits(out, *more)]
    job = subprocess.Popen(arguments, cwd=ROOT, env=environment(**place))
    while job.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    process = int((out / ".lock").read_text().split()[1])
    assert os.sched_getaffinity(process) == cores  # by default it would be one
    job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B: does
    assert job.wait(timeout=120) == 0
    assert calls.read_text() == f"requeue {place['SLURM_JOB_ID']}\n"
    step = saved_step(out)
    assert 0 < step == log_lines(out)[-1]["step"] < 30 * 62

    epochs = step // 62 + 2
    again = run([*arguments, "--stop_epoch", str(epochs)], **place)
    assert again.returncode == 0, again.stderr
    assert (out / "model.safetensors").exists() and len(calls.read_text().splitlines()) == 1
    steps = [line["step"] for line in log_lines(out) if "grad_norm" in line]
    assert steps == list(range(1, 62 * epochs + 1))


@pytest.mark.parametrize(
    ("file", "pattern"),
    [(SBATCH, r"^#   (sbatch .*)$"), (ROOT / "engine" / "README.md", r"^(sbatch .*)$")],
)
def test_the_commands_name_what_there_is(file, pattern):
    words = re.search(pattern, file.read_text(), re.M)[1].split()
    assert words[:4] == ["sbatch", "--nodes", "2", SBATCH.relative_to(ROOT).as_posix()]
    cfg = load_config(PretrainConfig, "pretrain", words[4:])
    assert cfg.data_path
