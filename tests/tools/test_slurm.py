"""`tools/slurm/pretrain.sbatch` with stand-ins for srun and scontrol: two nodes are two launchers
on this machine."""

import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT
from runs import digits, environment, log_lines

from engine.run.checkpoint import load_newest_checkpoint, weights_path
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

SBATCH = ROOT / "tools" / "slurm" / "pretrain.sbatch"
# Starts the command once per node and forwards SIGTERM, as srun does; ends with the worst exit
# code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
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
    calls, out = tmp_path / "calls", tmp_path / "out"
    env = environment(
        PATH=f"{tmp_path}:{environment()['PATH']}",
        SCONTROL_LOG=str(calls),
        NGPU="1",
        SLURM_NNODES="2",
        SLURM_JOB_ID=str(time.time_ns() % 10000),
        SLURM_JOB_NODELIST="node[0-1]",
    )
    arguments = digits(out, "--batch_size", 32, "--log_interval", 1, "--epochs", 30)
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            ["bash", str(SBATCH), *arguments], cwd=ROOT, env=env, stdout=log, stderr=log
        )
        while job.poll() is None and not (out / "log.jsonl").exists():
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B: does
        code = job.wait(timeout=120)
    assert code == 0, (tmp_path / "log").read_text()
    assert calls.read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    saved = load_newest_checkpoint(out)
    assert 0 < saved.step == log_lines(out)[-1]["step"] < 30 * 62

    arguments += ["--stop_epoch", str(saved.step // 62 + 2)]
    again = subprocess.run(
        ["bash", str(SBATCH), *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert weights_path(out).exists() and len(calls.read_text().splitlines()) == 1
    steps = [line["step"] for line in log_lines(out) if "grad_norm" in line]
    assert steps == list(range(1, 62 * (saved.step // 62 + 2) + 1))


@pytest.mark.parametrize(
    ("file", "pattern"),
    [(SBATCH, r"^#   (sbatch .*)$"), (ROOT / "engine" / "README.md", r"^(sbatch .*)$")],
)
def test_the_commands_name_what_there_is(file, pattern):
    words = re.search(pattern, file.read_text(), re.M)[1].split()
    assert words[:4] == ["sbatch", "--nodes", "2", SBATCH.relative_to(ROOT).as_posix()]
    cfg = load_config(PretrainConfig, "pretrain", words[4:])
    assert cfg.data_path
