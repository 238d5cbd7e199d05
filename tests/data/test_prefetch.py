"""What an error of the loader does to a run."""

import pytest
from runs import log_lines, make_pictures, pretraining

import main_pretrain
from data.sources import FolderSource


def test_an_error_of_the_loader_ends_a_run_after_the_steps_before(tmp_path, monkeypatch):
    data, read, reads = make_pictures(tmp_path / "data"), FolderSource.read, []

    def fails(self, index):
        reads.append(index)
        if len(reads) == 3 * 12 + 5:  # in the fourth step
            raise RuntimeError("the cable is out")
        return read(self, index)

    monkeypatch.setattr(FolderSource, "read", fails)
    with pytest.raises(RuntimeError, match="the cable is out"):
        main_pretrain.main(pretraining(data, tmp_path / "run"))
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]
