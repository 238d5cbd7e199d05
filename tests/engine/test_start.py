"""What entry scripts do before torch is imported: answers, and how the CPU is used."""

import os
import platform
import subprocess
import sys

import pytest
from runs import command, run

from engine.start import MALLOPT, SPIN_COUNT, WAITING


@pytest.mark.parametrize(
    ("stage", "arguments", "code", "said"),
    [
        ("pretrain", "--help", 0, "--mask_ratio"),
        ("finetune", "--dataset mnist5k --mixup 0.8 --print_config", 0, "mixup: 0.8"),
        ("lincls", "--lr fast --finetune random", 2, "lr must be"),
        ("pretrain", "--dataset mnist5k --num_heads 5", 2, "num_heads 5"),
        ("pretrain", "--data_path absent/images", 2, "data_path absent/images does not exist"),
        ("finetune", "--dataset mnist5k --finetune absent", 2, "finetune absent does not exist"),
        ("knn", "--load_path absent", 2, "load_path absent does not exist"),
    ],
)
def test_help_and_refusals_are_answered_before_torch_is_imported(stage, arguments, code, said):
    script = command(*arguments.split(), script=f"main_{stage}.py")
    done = run([script[0], "-X", "importtime", *script[1:]])
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code and said in "\n".join([done.stdout, *lines])
    assert len(lines) == bool(code)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "util.settings.read" in imported and not imported & {"torch", "numpy", "timm"}


def test_a_script_that_goes_on_reads_its_settings_once(tmp_path):
    """They may come through a pipe; and what was skipped is said once."""
    (tmp_path / "file").touch()
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    arguments = f"--config {pipe} --dataset mnist5k --output_dir {tmp_path}/file"
    process = subprocess.Popen(command(*arguments.split()), stderr=subprocess.PIPE, text=True)
    pipe.write_text("class_tokens: 0\ndecoder_class_token: false\nks: 3\n")
    said = [line.split()[:2] for line in process.communicate(timeout=60)[1].splitlines()]
    assert process.returncode == 2
    assert said == [["skipped", "settings"], ["error:", "output_dir"]]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("given", "spin_count", "keeps_memory"),
    [
        ({}, SPIN_COUNT, True),
        ({"OMP_WAIT_POLICY": "ACTIVE", "MALLOC_MMAP_THRESHOLD_": "131072"}, "None", False),
        ({"GOMP_SPINCOUNT": "9", "MALLOC_TRIM_THRESHOLD_": "131072"}, "9", False),
        ({"KMP_BLOCKTIME": "1", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, "None", False),
    ],
)
def test_waiting_threads_soon_sleep_and_freed_memory_is_kept_unless_told_otherwise(
    monkeypatch, given, spin_count, keeps_memory
):
    for name in WAITING | MALLOPT.keys():
        monkeypatch.delenv(name, raising=False)
    code = """if True:
        import os
        from engine.start import start
        from util.settings.evaluation import KnnConfig

        def resident() -> int:
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        start(KnnConfig)
        before = resident()
        b"x" * 2**24  # 16 MiB, freed at once
        print(os.environ.get("GOMP_SPINCOUNT"), resident() - before > 2**23)
    """
    done = run([sys.executable, "-c", code], **given)
    assert done.stdout.split() == [spin_count, str(keeps_memory)], done.stderr
