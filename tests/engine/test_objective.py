"""What a classifier is trained for: losses and weights by hand, a regression's unit, and mixing of
several labels."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from engine.evaluation.objective import HEAD_NAMES, Objective, build_objective
from engine.mixing import BatchMixer
from util.rng import seed_libraries
from util.settings.evaluation import FinetuneConfig

CPU = torch.device("cpu")


def built(labels: list, outputs: int = 3, **settings) -> Objective:
    cfg = FinetuneConfig(**{"labels": "t.csv", "val_share": 0.5, **settings})
    kind = np.float32 if cfg.objective == "regression" else np.int64
    return build_objective(cfg, list("abc")[:outputs], np.array(labels, dtype=kind), CPU)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0, 0, 0, 1, 2, 2]
    assert built(labels).weights is None
    objective = built(labels, class_weights="balanced")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert objective.weights.tolist() == pytest.approx(expected.tolist())
    logits, own = torch.randn(6, 3), torch.tensor(labels)
    weighed, plain = objective.losses(logits, own), objective.losses(logits, own, weigh=False)
    torch.testing.assert_close(weighed, plain * objective.weights[own])
    torch.testing.assert_close(plain, -logits.log_softmax(1).gather(1, own[:, None])[:, 0])
    several = built(
        [[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]],
        objective="multilabel",
        class_weights="balanced",
    )
    assert several.weights.tolist() == [3.0, 1.0, 1.0]  # negatives / positives, if there are both


def test_the_loss_of_several_labels_by_hand():
    objective = Objective("multilabel", ["a", "b"])
    outputs, targets = torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 0]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert objective.losses(outputs, targets).tolist() == pytest.approx([expected])
    # smoothing by 0.2 makes 1 and 0 to 0.9 and 0.1
    second = 0.1 * math.log(1 + math.exp(-2)) + 0.9 * math.log(1 + math.exp(2))
    assert objective.losses(outputs, targets, 0.2).tolist() == pytest.approx(
        [(math.log(2) + second) / 2]
    )


def test_a_regression_is_standardised_in_training_and_in_the_unit_of_the_data_in_a_file():
    objective = built([[10, 7], [20, 7], [60, 7]], 2, objective="regression")
    std = np.std([10, 20, 60])
    assert objective.mean.tolist() == [30, 7] and objective.std.tolist() == pytest.approx([std, 1])
    outputs, targets = torch.tensor([[0.5, 0.0]]), torch.tensor([[30.0 + 0.25 * std, 9.0]])
    expected = (0.25**2 / 2 + (2 - 0.5)) / 2  # smooth L1: squares below 1, lines beyond
    assert objective.losses(outputs, targets).tolist() == pytest.approx([expected])
    assert objective.predictions(outputs).tolist() == [pytest.approx([30 + 0.5 * std, 7])]
    features, head = torch.randn(4, 8), torch.nn.Linear(8, 2)
    written = objective.head_in_unit(*head.parameters())
    assert tuple(written) == HEAD_NAMES
    in_unit = torch.nn.functional.linear(features, *written.values())
    torch.testing.assert_close(in_unit, objective.predictions(head(features)).float())
    read = [tensor.detach().clone() for tensor in written.values()]
    objective.standardise(*read)
    torch.testing.assert_close(read, list(head.parameters()), check_stride=False)


def test_mixing_mixes_several_labels_as_it_mixes_the_images():
    """Image i is filled with one where label i is set, so both become the same shares."""
    cfg = FinetuneConfig(mixup=0.8, batch_size=4, label_smoothing=0.3)
    mixer = BatchMixer(cfg, Objective("multilabel", list("abcd")), CPU)
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    seed_libraries(3)
    images, shares = mixer(labels[:, :, None, None].float().expand(4, 4, 2, 2).clone(), labels)
    torch.testing.assert_close(images[..., 0, 0], shares)
    assert 0 < shares[0, 0] < 1 and shares.dtype == torch.float32
    smooth = 0.7 * shares + 0.15  # smoothing is part of the loss
    logits = torch.randn(4, 4)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, smooth)
    torch.testing.assert_close(mixer.loss(logits, shares), expected)
