"""Settings that are refused, each before any compute, with the names of the settings concerned."""

import os
import subprocess
import sys

import pytest
import torch
from runs import in_child, run

import main_finetune
import main_knn
import main_lincls
import main_pretrain
from tools import (
    check_dataset,
    convert_checkpoint,
    draw_overview,
    embed,
    pack_dataset,
    plot_run,
    predict,
    results_table,
    run_mae_vis,
    vit_explain,
)
from util.dist import NAMES, choose_device, init_processes
from util.errors import InputError, LocalInputError, run_cli

MAINS = {
    "pretrain": main_pretrain.main,
    "finetune": main_finetune.main,
    "lincls": main_lincls.main,
    "knn": main_knn.main,
    "mae_vis": run_mae_vis.main,
    "overview": draw_overview.main,
    "explain": vit_explain.main,
    "embed": embed.main,
    "predict": predict.main,
}
NEEDED = {  # what makes each command legal
    "lincls": "--finetune random",
    "knn": "--finetune random",
    "mae_vis": "--model_path w",
    "overview": "--model_path w",
    "explain": "--finetune random",
    "embed": "--finetune w --output_file o.npz",
    "predict": "--finetune w --output_file o.csv",
}
HUGE = "1" + "0" * 400
MATRIX = [
    # of the wrong type
    ("pretrain", "--lr fast", "lr"),
    ("pretrain", "--lr true", "lr"),
    ("pretrain", "--lr null", "lr"),
    ("pretrain", "--clip_grad x", "clip_grad"),
    ("pretrain", "--epochs 15.5", "epochs"),
    ("pretrain", "--epochs 1e2", "epochs"),
    ("pretrain", "--epochs true", "epochs"),
    ("pretrain", "--depth x", "depth"),
    ("pretrain", "--tensorboard maybe", "tensorboard"),
    ("pretrain", "--data_path=", "data_path"),
    ("pretrain", "--img_size 16 16 16", "img_size"),
    ("pretrain", "--patch_size 3.5", "patch_size"),
    ("pretrain", "--mean a b c", "mean"),
    ("finetune", "--auto_augment=", "auto_augment"),
    ("knn", "--ks 10 x", "ks"),
    # not finite, or too large
    ("pretrain", "--lr nan", "lr"),
    ("pretrain", "--lr=-inf", "lr"),
    ("pretrain", "--lr 1e999", "lr"),
    ("pretrain", f"--lr {HUGE}", "lr"),
    ("pretrain", f"--epochs {HUGE}", "epochs"),
    ("pretrain", "--std 1 1 inf", "std"),
    # outside the range: inclusive and exclusive bounds, and each item of a list
    ("pretrain", "--lr 0", "lr"),
    ("pretrain", "--min_lr=-1e-9", "min_lr"),
    ("pretrain", "--mask_ratio 0", "mask_ratio"),
    ("pretrain", "--mask_ratio 1", "mask_ratio"),
    ("pretrain", "--beta2 1", "beta2"),
    ("pretrain", "--hflip 1.01", "hflip"),
    ("pretrain", "--crop_min 0", "crop_min"),
    ("pretrain", "--epochs 0", "epochs"),
    ("pretrain", "--num_workers -1", "num_workers"),
    ("pretrain", "--patch_size 16 0", "patch_size"),
    ("pretrain", "--std 1 0 1", "std"),
    ("pretrain", "--seed 2147483648", "seed"),
    ("pretrain", "--embed_dim 3", "embed_dim"),
    ("pretrain", "--visible_weight=-0.1", "visible_weight"),
    ("pretrain", "--target lowpass --target_cutoff 1.1", "target_cutoff"),
    ("pretrain", "--decoder_fusion=-1", "decoder_fusion"),
    ("pretrain", "--timeout 10001", "timeout"),
    ("lincls", "--momentum 1", "momentum"),
    ("lincls", "--lr 0.1 0", "lr"),
    ("knn", "--temperature 0.001", "temperature"),
    ("knn", "--ks 10 0", "ks"),
    ("mae_vis", "--mask_ratio 0.5 1", "mask_ratio"),
    # none of the choices
    ("pretrain", "--size smal", "size"),
    ("pretrain", "--precision int3", "precision"),
    ("finetune", "--global_pool cls", "global_pool"),
    ("pretrain", "--target low", "target"),
    ("pretrain", "--crop random", "crop"),
    ("pretrain", "--optimizer sgd", "optimizer"),
    ("lincls", "--optimizer adam", "optimizer"),
    ("explain", "--reader cls", "reader"),
    ("embed", "--layer x", "layer"),
    ("embed", "--pool cls", "pool"),
    ("predict", "--threshold 1.5", "threshold"),
    # legal alone and wrong together
    ("pretrain", "--dataset folder", "data_path"),
    ("pretrain", "--dataset cifar10", "data_path"),
    ("pretrain", "--dataset folder --data_path x --download", "download"),
    ("pretrain", "--download", "download"),
    ("pretrain", "--epochs 9", "warmup_epochs"),
    ("pretrain", "--stop_epoch 101", "stop_epoch"),
    ("pretrain", "--min_lr 2e-4", "min_lr"),
    ("pretrain", "--mean 0.5", "mean"),
    ("pretrain", "--std 1 1", "std"),
    ("pretrain", "--in_chans 2 --mean 0 0 --std 1 1 --channels 3", "channels"),
    ("pretrain", "--pixel_range 1 0", "pixel_range"),
    ("pretrain", "--pixel_range auto 5", "pixel_range"),
    ("pretrain", "--pixel_range nan 5", "pixel_range"),
    ("pretrain", "--dicom_window 40 0", "dicom_window"),
    ("pretrain", "--show_channels 1 2", "show_channels"),
    ("pretrain", "--show_channels 4", "show_channels"),
    ("finetune", "--auto_augment rand-m9 --pixel_range 0 1", "auto_augment"),
    ("pretrain", "--img_size 224 230", "patch_size"),
    ("pretrain", "--num_heads 5", "num_heads"),
    ("pretrain", "--class_tokens 0", "decoder_class_token"),
    ("pretrain", "--decoder_num_heads 7", "decoder_num_heads"),
    ("pretrain", "--mask_ratio 0.999", "mask_ratio"),
    ("pretrain", "--decoder_fusion 13", "decoder_fusion"),
    ("pretrain", "--decoder_fusion 1", "decoder_fusion"),
    ("pretrain", "--target_cutoff 0.5", "target_cutoff"),
    ("pretrain", "--optimizer muon --parallel fsdp", "optimizer"),
    ("pretrain", "--crop simple --img_size 4 --patch_size 1", "crop"),
    ("mae_vis", "--decoder_fusion 13", "decoder_fusion"),
    ("pretrain", "--mask grid --mask_ratio 0.6", "mask"),
    ("pretrain", "--mask grid --mask_ratio 0.9375", "mask"),  # 4 divides no grid of 14 x 14
    ("pretrain", "--mask grid --img_size 288 --mask_ratio 0.89", "mask_ratio"),  # keeps no ninth
    ("pretrain", "--mask block --mask_block 4", "mask_block"),
    ("pretrain", "--mask beit", "mask"),
    ("pretrain", "--mask_block 0", "mask_block"),
    ("pretrain", "--mask block --mask_block 14", "mask_block"),
    ("pretrain", "--target lowpass --target_cutoff 0.008", "target_cutoff"),
    ("pretrain", "--monitor_gauges 1", "monitor_gauges"),
    ("pretrain", "--batch_size 64 --aug_repeats 3", "batch_size"),
    ("pretrain", "--monitor_probe --monitor_knn 0", "monitor_probe"),
    ("finetune", "--mixup 0.8 --batch_size 7", "batch_size"),
    ("finetune", "--auto_augment rand-x9", "auto_augment"),
    ("finetune", "--finetune random", "finetune"),
    ("finetune", "--ema_decay 0.9 --parallel fsdp", "ema_decay"),
    ("finetune", "--eval", "finetune"),
    ("finetune", "--finetune w --size small --lora_rank 385", "lora_rank"),
    ("finetune", "--finetune w --size small --freeze_blocks 13", "freeze_blocks"),
    ("finetune", "--finetune w --freeze_blocks 1 --lora_rank 4", "freeze_blocks"),
    ("finetune", "--finetune w --lora_rank 4 --parallel fsdp", "lora_rank"),
    ("finetune", "--lora_rank 4", "finetune"),
    ("finetune", "--global_pool token --class_tokens 0", "global_pool"),
    ("finetune", "--objective regression", "objective"),
    ("finetune", "--group patient", "group"),
    ("finetune", "--dataset folder --data_path x --labels t.csv", "labels"),
    ("finetune", "--labels t.csv --val_share 0.2", "labels"),
    ("finetune", "--best_metric map", "best_metric"),
    (
        "finetune",
        "--dataset folder --data_path x --labels t.csv --val_share 0.2 --objective regression "
        "--mixup 0.2 --class_weights balanced",
        "class_weights objective",
    ),
    (
        "knn",
        "--dataset folder --data_path x --labels t.csv --val_share 0.2 --objective multilabel",
        "objective",
    ),
    # of segmentation and detection
    ("finetune", "--task segment", "dataset"),
    ("finetune", "--dataset digits_scenes", "dataset"),
    ("finetune", "--task segment --dataset folder", "data_path"),
    ("finetune", "--task detect --dataset folder --data_path x --dicom_frames all", "dicom_frames"),
    ("finetune", "--task detect --dataset digits_scenes --scale_min 3", "scale_min"),
    ("finetune", "--task detect --dataset digits_scenes --data_on_device true", "data_on_device"),
    (
        "finetune",
        "--task segment --dataset folder --data_path x --zero_is_ignored true --ignore_index 0",
        "zero_is_ignored",
    ),
    ("finetune", "--task detect --dataset digits_scenes --mixup 0.8", "mixup"),
    ("finetune", "--task detect --dataset digits_scenes --eval_mode slide", "eval_mode"),
    ("finetune", "--task segment --dataset digits_scenes --region_samples 64", "region_samples"),
    ("finetune", "--task segment --dataset digits_scenes --crop_pct 0.9", "crop_pct"),
    ("finetune", "--task segment --dataset digits_scenes --class_file x", "class_file"),
    ("finetune", "--dataset mnist5k --window_size 4", "window_size"),
    ("lincls", "--task segment --dataset digits_scenes --val_json v", "val_json"),
    ("knn", "--dataset mnist5k --memory_patches 9", "memory_patches"),
    ("finetune", "--task detect --dataset digits_scenes --best_metric miou", "best_metric"),
    ("finetune", "--task pose", "task"),
    ("lincls", "--task detect", "task"),
    ("knn", "--task segment --dataset digits_scenes --save_path x", "save_path"),
    ("knn", "--task segment --dataset digits_scenes --compile true", "compile"),
    ("lincls", "--task segment --dataset digits_scenes --compile true", "compile"),
    (
        "finetune",
        "--task segment --dataset digits_scenes --class_weights balanced",
        "class_weights",
    ),
    ("lincls", "--finetune null", "finetune"),
    ("lincls", "--lr 0.1 1 --min_lr 0.01", "min_lr"),
    ("lincls", "--lr 0.1 0.1", "lr"),
    ("lincls", "--probe attentive --probe_queries 5", "probe_queries"),
    ("lincls", "--probe attentive --probe_value_ratio 1.5", "probe_value_ratio"),
    ("lincls", "--probe attentive --global_pool token", "probe"),
    ("lincls", "--probe attentive --task segment --dataset digits_scenes", "probe"),
    ("lincls", "--probe nonlinear", "probe"),
    ("lincls", "--size debug --layer 2", "layer"),
    ("lincls", "--lbfgs_c 1 1.0", "lbfgs_c"),
    ("lincls", "--lbfgs_c 0", "lbfgs_c"),
    (
        "lincls",
        "--dataset folder --data_path x --labels t.csv --val_share 0.2 --objective multilabel "
        "--optimizer lbfgs",
        "optimizer",
    ),
    ("lincls", "--task segment --dataset digits_scenes --optimizer lbfgs", "optimizer"),
    ("lincls", "--task segment --dataset digits_scenes --last_norm false", "last_norm"),
    ("knn", "--size debug --layer -1 -3", "layer"),
    ("knn", "--load_path a --layer 0", "load_path"),
    ("knn", "--load_path a --last_norm false", "load_path"),
    ("knn", "--task segment --dataset digits_scenes --layer 0 1", "layer"),
    ("lincls", "--probe attentive --optimizer lbfgs", "probe"),
    ("knn", "--finetune null", "finetune"),
    ("knn", "--ks 10 10", "ks"),
    ("knn", "--save_path a --load_path b", "save_path"),
    ("mae_vis", "--model_path null", "model_path"),
    ("mae_vis", "--dataset folder", "img_path"),
    ("mae_vis", "--seed 1 1", "seed"),
    ("mae_vis", "--model_path w --img_path x --mask block --mask_block 3", "mask_block"),
    ("mae_vis", "--mask_ratio 0.5 0.50", "mask_ratio"),
    ("overview", "--seed 1 2", "seed"),
    ("overview", "--img_path a b", "img_path"),
    ("explain", "--finetune null", "finetune"),
    ("explain", "--reader probe --layer_index 0 --category_index 1", "layer_index category_index"),
    ("explain", "--dataset folder", "image_path"),
    ("embed", "--output_file o.txt", "output_file"),
    ("embed", "--finetune null", "finetune"),
    ("predict", "--output_file null", "output_file"),
    ("predict", "--dataset folder", "data_path"),
    ("predict", "--dataset parquet", "data_path"),
    # several at once
    ("lincls", "--lr -1 --epochs 0 --device q", "lr epochs device"),
    ("pretrain", "--in_chans 2 --epochs 9 --num_heads 5", "mean std warmup_epochs num_heads"),
]


@pytest.mark.parametrize(("stage", "arguments", "names"), MATRIX)
def test_a_refusal_names_its_settings_and_touches_nothing(
    tmp_path, monkeypatch, stage, arguments, names
):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", "mnist5k", *NEEDED.get(stage, "").split(), *arguments.split()]
    argv.append("--print_config")  # ends the command here if nothing is refused
    with pytest.raises(InputError) as error:
        MAINS[stage](argv)
    found = error.value.settings
    assert sorted(found) == sorted(names.split())
    assert len(str(error.value).splitlines()) == (1 if len(found) == 1 else len(found) + 1)
    assert list(tmp_path.iterdir()) == []


# What a user sees of a mistake


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and no others of them."""

    def set_variables(variables: dict[str, str]) -> None:
        others = {name: value for name, value in os.environ.items() if name not in NAMES}
        monkeypatch.setattr(os, "environ", others | variables)

    return set_variables


@pytest.mark.parametrize(
    ("error", "variables", "code", "said"),
    [
        (InputError("no such folder"), {}, 2, "error: no such folder\n"),
        (InputError("no folder"), {"RANK": "1", "LOCAL_RANK": "1"}, 2, ""),  # process 0 says it
        (LocalInputError("my disk"), {"RANK": "1", "LOCAL_RANK": "1"}, 2, "error: my disk\n"),
        (InputError("no folder"), {"LOCAL_RANK": "1"}, 2, "error: no folder\n"),  # left over
        (KeyboardInterrupt(), {}, 130, "interrupted\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(
    capsys, launched, error, variables, code, said
):
    def main() -> None:
        raise error

    launched(variables)
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert (stop.value.code, capsys.readouterr().err) == (code, said)


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


STAGES = ("pretrain", "finetune", "lincls", "knn")
TOOLS = {
    "check": check_dataset.main,
    "convert": convert_checkpoint.main,
    "pack": pack_dataset.main,
    "plot": plot_run.main,
    "table": results_table.main,
}
PATHS = [  # every argument that is a path
    *((command, "--config BAD") for command in MAINS),
    *((stage, "--data_path BAD") for stage in STAGES),
    *((stage, "--data_path BAD --dataset packed") for stage in STAGES),
    *((stage, "--data_path BAD --dataset cifar10") for stage in STAGES),
    *((stage, "--dataset mnist5k --output_dir BAD") for stage in STAGES),
    *((stage, "--data_path DATA --output_dir OUT --finetune BAD") for stage in STAGES[1:]),
    ("knn", "--data_path DATA --output_dir OUT --save_path BAD"),
    ("knn", "--data_path DATA --output_dir OUT --load_path BAD"),
    *((tool, "--img_path PICTURE --model_path BAD") for tool in ("mae_vis", "overview")),
    *((tool, "--model_path WEIGHTS --img_path BAD") for tool in ("mae_vis", "overview")),
    *((tool, "--model_path WEIGHTS --data_path BAD") for tool in ("mae_vis", "overview")),
    ("mae_vis", "--model_path WEIGHTS --img_path PICTURE --save_path BAD"),
    ("overview", "--config CONFIG --model_path WEIGHTS --img_path PICTURE --save_path BAD"),
    ("explain", "--image_path PICTURE --finetune BAD"),
    ("explain", "--finetune WEIGHTS --image_path BAD"),
    ("explain", "--finetune WEIGHTS --data_path BAD"),
    ("explain", "--finetune WEIGHTS --image_path PICTURE --save_path BAD"),
    *((tool, "--data_path DATA --finetune BAD") for tool in ("embed", "predict")),
    *((tool, "--finetune WEIGHTS --data_path BAD") for tool in ("embed", "predict")),
    ("embed", "--finetune WEIGHTS --data_path BAD --dataset parquet"),
    ("predict", "--finetune WEIGHTS --data_path DATA --output_file BAD"),
    ("check", "BAD"),
    ("check", "DATA --json BAD"),
    ("check", "DATA --problems BAD"),
    ("convert", "BAD --describe"),
    ("convert", "WEIGHTS BAD --format timm"),
    ("pack", "BAD OUT"),
    ("pack", "DATA BAD"),
    ("pack", "--index BAD"),
    ("plot", "BAD"),
    ("plot", "RUN --save_path BAD"),
    ("table", "BAD"),
]


def exit_code(command: str, arguments: str, **words: object) -> object:
    """Of a command line in which the words in capitals are replaced."""
    argv = [str(words.get(word, word)) for word in arguments.split()]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: (MAINS | TOOLS)[command]([*NEEDED.get(command, "").split(), *argv]))
    return stop.value.code


@pytest.mark.fault("R33")
@pytest.mark.parametrize(("command", "arguments"), PATHS)
def test_a_name_that_is_too_long_is_one_line(
    tmp_path, monkeypatch, capsys, data, pretrained, weights, command, arguments
):
    monkeypatch.chdir(tmp_path)
    names = {"DATA": data, "RUN": pretrained, "WEIGHTS": weights, "OUT": tmp_path / "out"}
    names |= {"BAD": tmp_path / ("n" * 300), "PICTURE": data / "val/one/040.png"}
    names["CONFIG"] = pretrained / "config.yaml"
    assert exit_code(command, arguments, **names) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "n" * 300 in error or f"--{error.split()[1]}" in arguments


@pytest.mark.fault("R33")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("pretrain", "--dataset mnist5k --output_dir BAD"),
        ("check", "BAD"),
        ("pack", "BAD OUT"),
        ("plot", "BAD"),
        ("table", "BAD"),
    ],
)
def test_a_folder_that_is_closed_to_the_user_is_one_line(tmp_path, capfd, command, arguments):
    (tmp_path / "closed").mkdir(mode=0)

    def as_another_user() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        os._exit(exit_code(command, arguments, BAD=tmp_path / "closed/below"))

    assert in_child(as_another_user) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert str(tmp_path) in error


def shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell line in which "$@" reads pretraining's settings, as the entry scripts do."""
    code = """if True:
        from util.errors import run_cli
        from util.settings.pretrain import PretrainConfig
        from util.settings.read import load_config

        run_cli(lambda: load_config(PretrainConfig, "pretrain"))
    """
    command = ["bash", sys.executable, "-c", code, *arguments]
    return run(["bash", "-c", f"set -o pipefail; {line}", *command])


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_not_change_the_exit_code(closed):
    good = shell(f'"$@" {closed}', "--data_path", "x", "--print_config")
    bad = shell(f'"$@" {closed}', "--lr", "fast")
    assert (good.returncode, bad.returncode) == (0, 2)
    assert "Traceback" not in good.stderr + bad.stderr
    assert ("fast" in bad.stderr) == ("2>&-" not in closed)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_ends_the_command_quietly(monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = shell('"$@" | true', "--data_path", "x", "--print_config")
    assert (done.returncode, done.stderr) == (141, "")


# What the launcher's variables say

FIRST_OF_TWO = dict(zip(NAMES, ("0", "2", "0", "2", "localhost", "29500"), strict=True))


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": ""},
        {"LOCAL_RANK": "0"},  # left over
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        FIRST_OF_TWO | {"RANK": "2"},
        FIRST_OF_TWO | {"RANK": "-1"},
        FIRST_OF_TWO | {"LOCAL_RANK": "2"},
    ],
)
def test_variables_of_a_launcher_that_do_not_fit_together_are_refused(launched, variables):
    launched(variables)
    with pytest.raises(LocalInputError) as error, init_processes("cpu"):
        pass
    assert all(f"{name}={value!r}" in str(error.value) for name, value in variables.items())


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_a_single_process_needs_no_variables(launched, variables):
    launched(variables)
    with init_processes("cpu") as processes:
        assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
        assert processes.device == torch.device("cpu")


def test_a_gpu_whose_driver_does_not_work_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0).type != "cuda"
    with pytest.raises(InputError, match="device cuda"):
        choose_device("cuda", 0)


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch):
    def fails():
        raise BrokenPipeError("to a process")

    with pytest.raises(BrokenPipeError, match="to a process"):
        run_cli(fails)
