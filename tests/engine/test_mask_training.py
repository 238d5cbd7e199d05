"""Training under each kind of mask: exact on resume, in whatever way the images are loaded, and on
any number of processes."""

import numpy as np
import pytest
from compare import assert_same_run
from runs import Cut, cut_after, launch, pretrain_pictures, pretraining, step_losses
from test_reconstruction import removed_of

import main_pretrain
from models.mae import MaskedAutoencoder
from models.masks import Mask

EIGHTS = ("--img_size", 32, "--patch_size", 4)  # a grid of 8 x 8 patches
RUNS = {  # kind -> how it is trained
    "block": (*EIGHTS, "--mask_block", 4, "--aug_repeats", 2),
    "grid": (*EIGHTS, "--shared_mask", "true"),
    "green": (*EIGHTS, "--data_on_device", "true"),
    "blockwise": ("--decoder", "cross", "--pred_ratio", 0.25),
}


def is_of_kind(kind: str, removed: np.ndarray) -> bool:
    """Whether a mask of a quarter of 8 x 8 patches can be of this kind, by what it keeps."""
    rows, columns = np.nonzero(~removed)
    if kind == "block":  # one square of 4 x 4
        return len(rows) == 16 and len({*zip(rows // 4, columns // 4, strict=True)}) == 1
    if kind == "grid":
        return len(rows) == 16 and len({*zip(rows % 2, columns % 2, strict=True)}) == 1
    return True


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_goes_on_bit_for_bit(tmp_path, data, monkeypatch, kind):
    masks, forward = [], MaskedAutoencoder.forward

    def watching(model, images, ids_shuffle, *more):
        masks.extend(removed_of(Mask(ids, model.num_kept), model.grid_size) for ids in ids_shuffle)
        return forward(model, images, ids_shuffle, *more)

    monkeypatch.setattr(MaskedAutoencoder, "forward", watching)
    arguments = pretraining(data, tmp_path / "run", "--mask", kind, *RUNS[kind])
    pretrain_pictures(data, tmp_path / "whole", "--mask", kind, *RUNS[kind])
    whole = [mask.tobytes() for mask in masks]
    assert len(whole) == 240 and all(is_of_kind(kind, mask) for mask in masks)
    different = {"block": 4, "grid": 4, "green": 200, "blockwise": 200}[kind]
    assert len(set(whole)) >= different
    assert (len(set(whole[:12])) == 1) == (kind == "grid")  # of one step, shared
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 13)
        main_pretrain.main(arguments)
    main_pretrain.main(arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    pretrain_pictures(data, tmp_path / "random", *RUNS[kind], "--mask", "random")
    assert step_losses(tmp_path / "random") != step_losses(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "more"), [("green", ()), ("block", ("--parallel", "fsdp")), ("grid", ())]
)
def test_two_processes_draw_the_masks_of_one(tmp_path, data, kind, more):
    more = ("--mask", kind, *EIGHTS, "--num_workers", 0, *more)
    pretrain_pictures(data, tmp_path / "one", *more)
    result = launch(pretraining(data, tmp_path / "two", *more, "--batch_size", 6), 2)
    assert result.returncode == 0, result.stderr
    one, two = (
        {step: float.fromhex(loss) for step, loss in step_losses(tmp_path / name).items()}
        for name in ("one", "two")
    )
    assert len(one) == 20 and two == pytest.approx(one, rel=1e-5, abs=0)
