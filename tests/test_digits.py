"""Real training on labels from a table: 5,000 digits as PNG files, each with whether it has a loop
(0, 6, 8 and 9), whether it is even, and its value. tools/README.md has the figures; `-rP` prints
them."""

import csv
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, command, results_of, run

from data.known_sets import read_mnist5k

pytestmark = pytest.mark.long
LOOPS = (0, 6, 8, 9)
RECIPE = ["--config", str(ROOT / "cfgs/quickstart/finetune.yaml"), "--dataset", "folder"]
COLUMNS = {"multilabel": ["loop", "even"], "regression": ["value"]}
EPOCHS = 15


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder of the images and `digits.csv`."""
    root = tmp_path_factory.mktemp("digits")
    with (root / "digits.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "loop", "even", "value", "split"])
        for split in ("train", "val"):
            images, labels = read_mnist5k(train=split == "train")
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                name = f"{split}_{number:04d}.png"
                Image.fromarray(image[0]).save(root / name)
                rows.writerow([name, int(label in LOOPS), int(label % 2 == 0), label, split])
    return root


@pytest.mark.parametrize("objective", COLUMNS)
def test_digits_as_labels_and_as_numbers(tmp_path, digits, objective):
    """From scratch, on one thread."""
    table = ["--data_path", digits, "--labels", digits / "digits.csv", "--split_column", "split"]
    target = ["--objective", objective, "--label_columns", *COLUMNS[objective]]
    more = ["--epochs", EPOCHS, "--label_smoothing", 0, "--per_class", "--output_dir", tmp_path]
    on = ["--device", "cpu", "--precision", "fp32", "--tensorboard", "false"]
    words = [*RECIPE, *table, *target, *more, *on]
    result = run(command(*map(str, words), script="main_finetune.py"))
    assert result.returncode == 0, result.stderr
    results = results_of(tmp_path)
    assert (results["num_train"], results["num_samples"]) == (4000, 1000)
    sys.stdout.write(f"{results}\n")
    if objective == "multilabel":  # half of the digits are even, two fifths have a loop
        assert results["map"] > 0.96 and results["auroc"] > 0.96 and results["f1"] > 0.88
    else:  # of 2.87, by which the mean alone would miss
        assert results["mae"] < 1.5 and results["rmse"] < 2 and results["r2"] > 0.55
