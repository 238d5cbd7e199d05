"""Options of pretraining in whole runs: they resume exactly, on any number of processes, sharded
or not, and what they leave is a plain encoder to all others."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import assert_same_run
from runs import launch, log_lines, pictures, pretrain_pictures, pretraining, step_losses

import main_knn
import main_pretrain
from engine.run.checkpoint import load_newest_checkpoint, save_checkpoint
from models.mae import DECODER_NAMES
from models.weights.load import load_autoencoder
from models.weights.read import read_weights
from util.errors import InputError

ALL = shlex.split("""--decoder_fusion 2 --target lowpass --target_cutoff 0.5 --crop simple
--visible_weight 0.1 --optimizer muon --hflip 0.5""")
CROSS = shlex.split("""--decoder cross --pred_ratio 0.25 --decoder_depth 2 --decoder_fusion 2
--visible_weight 0.1""")
EVERY = [ALL, CROSS]


@pytest.fixture(scope="module", params=EVERY, ids=["all", "cross"])
def finished(request, data, tmp_path_factory) -> tuple[list[str], Path]:
    """The options, and the folder of a run of two epochs with them."""
    return request.param, pretrain_pictures(
        data, tmp_path_factory.mktemp("finished"), *request.param
    )


def losses(folder: Path) -> list[float]:
    return [float.fromhex(loss) for loss in step_losses(folder).values()]


def test_a_stopped_run_goes_on_bit_for_bit(data, finished, tmp_path):
    options, folder = finished
    found = losses(folder)
    assert len(found) == 20 and found[-1] < found[0]
    pretrain_pictures(data, tmp_path / "run", *options, "--stop_epoch", 1)
    pretrain_pictures(data, tmp_path / "run", *options)
    assert_same_run(folder, tmp_path / "run")


def test_images_on_the_device_and_micro_batches_change_nothing(data, finished, tmp_path):
    options, folder = finished
    micro = ["--batch_size", 4, "--total_batch_size", 12]
    pretrain_pictures(data, tmp_path / "micro", *options, *micro)
    # Muon's direction is computed in bf16, in which a gradient's last digits show
    within = 2e-4 if "muon" in options else 1e-5
    assert losses(tmp_path / "micro") == pytest.approx(losses(folder), abs=within)
    if "simple" in options:  # whose pixels are the loader's; those of the other crop are not
        pretrain_pictures(data, tmp_path / "placed", *options, "--data_on_device")
        assert losses(tmp_path / "placed") == losses(folder)


def test_the_weights_say_what_the_decoder_is_and_are_a_plain_encoder(data, finished, tmp_path):
    options, folder = finished
    path = folder / "model.safetensors"
    tensors, info = read_weights(path)
    assert info.spec.decoder_fusion == 2
    assert info.spec.target == ("lowpass" if "lowpass" in options else "pixels")
    model = load_autoencoder(tensors, info, path)
    of_run = load_newest_checkpoint(folder).model
    assert all(torch.equal(model.state_dict()[name], t) for name, t in of_run.items())
    # the encoder as that of a run without a decoder's mix
    plain = pretrain_pictures(data, tmp_path / "plain", "--epochs", 1)
    names = [
        {name for name in read_weights(of / "model.safetensors")[0] if name.startswith("blocks.")}
        for of in (folder, plain)
    ]
    assert names[0] == names[1]
    assert any(name.startswith("decoder_fusion") for name in tensors)
    assert "decoder_fusion".startswith(DECODER_NAMES[0])
    knn = pictures(data, tmp_path / "knn", "--finetune", path, "--ks", 5, training=False)
    assert main_knn.main(knn)["acc1"] > 0
    # and pretraining goes on from it, with the mix and without
    for more in (options, []):
        begun = tmp_path / f"begun{len(more)}"
        pretrain_pictures(data, begun, *more, "--init", path, "--epochs", 1)
        if more:
            assert losses(begun)[0] < 0.97 * losses(folder)[0]


@pytest.mark.parametrize("change", ["--visible_weight 0.2", "--crop resized", "--optimizer adamw"])
def test_a_change_that_alters_the_result_is_refused_on_resume(data, tmp_path, change):
    arguments = pretraining(data, tmp_path, *ALL, "--stop_epoch", 1)
    main_pretrain.main(arguments)
    name = change.split()[0].lstrip("-")
    with pytest.raises(InputError, match=f"{name}: .* -> {change.split()[1]}"):
        main_pretrain.main([*arguments, *change.split()])


def test_a_run_of_before_there_were_options_goes_on(data, tmp_path):
    pretrain_pictures(data, tmp_path, "--stop_epoch", 1)
    saved = load_newest_checkpoint(tmp_path)
    later = {"decoder_fusion", "target", "target_cutoff"}
    args = {name: value for name, value in saved.model_args.items() if name not in later}
    config = {n: v for n, v in saved.config.items() if n not in {*later, "crop", "optimizer"}}
    save_checkpoint(tmp_path, replace(saved, model_args=args, config=config), keep_last=1)
    pretrain_pictures(data, tmp_path)
    assert load_newest_checkpoint(tmp_path).step == 20
    with pytest.raises(InputError, match="decoder_fusion: 0 -> 2"):
        pretrain_pictures(data, tmp_path, "--decoder_fusion", 2)


@pytest.mark.long
@pytest.mark.parametrize("options", [*EVERY, ALL[:-4]], ids=["all", "cross", "all but muon"])
def test_the_losses_are_the_same_on_any_processes_sharded_or_not(data, tmp_path, options):
    """And a run goes on from two processes on one."""
    batch = ["--total_batch_size", 12, *options]
    pretrain_pictures(data, tmp_path / "one", *batch)
    ways = [["--parallel", "ddp"]] + ([["--parallel", "fsdp"]] if "muon" not in options else [])
    for more in ways:
        folder = tmp_path / more[-1]
        two = pretraining(data, folder, *batch, "--batch_size", 6, *more)
        result = launch([*two, "--stop_epoch", "1"], 2)
        assert result.returncode == 0, result.stderr
        copy = shutil.copytree(folder, tmp_path / f"{more[-1]} to one")
        assert launch(two, 2).returncode == 0
        pretrain_pictures(data, copy, *batch)
        for of in (folder, copy):
            within = 2e-4 if "muon" in options else 1e-5
            assert losses(of) == pytest.approx(losses(tmp_path / "one"), abs=within), of
    assert len(log_lines(folder)) > 20
