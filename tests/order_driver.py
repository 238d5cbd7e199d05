"""As `fault_driver.py`, and it writes what each step was computed from: `order_driver.py
main_pretrain.py ARGUMENTS`.

With USED, a folder, each process writes there a line per micro-batch: its step, and of every sample
the image's index, epoch and position with a sha256 of the mask and of the pixels that the model was
given. With SETTLED a step begins when the save before it is complete, so that a kill between two
steps finds that checkpoint.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fault_driver
from torch import Tensor

from data.sampler import SampleKey
from engine.run.faults import BadSamples
from models.mae import MaskedAutoencoder
from util.errors import run_cli

keys: list[SampleKey] = []  # of the micro-batch under way


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def main() -> Any:
    collect, forward = BadSamples.collect, MaskedAutoencoder.forward

    def noted(bad_samples: BadSamples, batch: Any) -> None:
        keys[:] = batch.keys
        collect(bad_samples, batch)

    def written(model: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor) -> Tensor:
        samples = [
            [key.image, key.epoch, key.position, sha256(mask), sha256(image)]
            for key, mask, image in zip(keys, ids_shuffle, images, strict=True)
        ]
        with (Path(os.environ["USED"]) / f"{fault_driver.RANK}.jsonl").open("a") as file:
            file.write(json.dumps({"step": keys[0].step + 1, "samples": samples}) + "\n")
        return forward(model, images, ids_shuffle)

    if "USED" in os.environ:
        BadSamples.collect, MaskedAutoencoder.forward = noted, written
    if "SETTLED" in os.environ:
        fault_driver.before(fault_driver, "on_step", lambda saver: saver.wait())
    return fault_driver.main()


if __name__ == "__main__":
    run_cli(main)
