"""`make quickstart` from its first command to what it leaves: table, pictures, page. Its curves are
those of every run, see `test_pretrain.py` and `test_monitor.py`."""

import re
from pathlib import Path

import pytest
from runs import log_lines, run

from tools import results_table


def quickstart(output: Path) -> str:
    """What `make quickstart` prints."""
    result = run(["make", "quickstart", f"OUTPUT={output}"], MAKEFLAGS="")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
def test_make_quickstart_and_what_it_leaves(tmp_path):
    quickstart(tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.glob("*/*.png")}
    printed = quickstart(tmp_path)  # again: all but the k-NN are finished
    assert printed.count("already finished") == 5
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*.png")} == first
    names = {"reconstructions/grid.png", "rollout/rollouts.png", "pretrain/report.html"}
    written = re.findall(r"^wrote (\S+\.(?:png|html))", printed, re.M)
    assert {str(tmp_path / name) for name in names} <= set(written)

    table = results_table.main([str(tmp_path)])
    assert f"{table['knn']['pretrained']:.2f}" in printed
    for stage, of_stage in table.items():
        assert of_stage["pretrained"] > of_stage["untrained"] + 3, stage

    records = log_lines(tmp_path / "pretrain")
    losses = [record["epoch_loss"] for record in records if "epoch_loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    observed = [record for record in records if record.get("kind") == "monitor"]
    assert [record["epoch"] for record in observed] == [0, 8, 16, 24, 32]
    for name, gain in (("knn_acc1", 10), ("psnr", 2)):
        assert observed[-1][name] > observed[0][name] + gain, name
