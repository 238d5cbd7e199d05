"""The images under a folder, by name. What a large listing found is kept and used at the next
start.

Listing a million files takes minutes on a network disk. A folder's times change when an entry is
added, removed or renamed, so one look at each folder (1,000 for ImageNet) tells whether a kept list
is what listing anew would find:

- Kept is, for every folder that was entered, also through links, its inode, mtime and ctime from
  before its entries were read. ctime, as mtime can be set back (rsync, tar). Not the device, whose
  number changes with a restart.
- A link to no folder is looked at, too, as a folder may appear at its end, which changes no folder
  on the way.
- Folders that changed within the last minute are not trusted: a second change could carry the same
  time. So neither are file systems that are not known to keep these times, such as those of object
  stores.

It lies in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`), as it belongs to the
images, not to a run: all stages and tools share it, and the images' own folder may be read-only. It
holds a sha256 of itself; what is damaged, outdated or cannot be written is no error, the images are
then listed anew.
"""

import hashlib
import json
import logging
import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import InputError
from util.files import TEMPORARY, write_temporary

# What counts as an image when a folder is listed; what it really holds is found out when it is
# decoded.
IMAGE_ENDINGS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
VERSION = (
    1  # of the kept file; another one, too, when other names are to be found in the same folders
)
KEPT_FROM = 100_000  # images; fewer are listed in seconds
KEPT_SHARE = 10  # images per look; with fewer, looking costs as much as listing
RECENT_S = 60  # far more than any clock's grain, as a file server's clock may differ from ours
KEEP_TIMES = frozenset(
    {
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "f2fs",
        "zfs",
        "tmpfs",
        "overlay",
        "nfs",
        "nfs4",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "wekafs",
    }
)
LEFTOVER_S = 3600  # after which a half-written file's process is surely gone
logger = logging.getLogger(__name__)


class Folder(NamedTuple):
    """A folder by its path below the root, its state when it was entered, and the images in it by
    name."""

    path: str
    state: list[int]
    images: list[str]


class Listing(NamedTuple):
    """All folders in the order in which they were entered, and the links that lead to none, by path
    below the root."""

    folders: list[Folder]
    links: list[str]

    def names(self) -> list[str]:
        """Paths of the images below the root, sorted."""
        return sorted(_join(folder.path, name) for folder in self.folders for name in folder.images)


def image_names(root: Path) -> list[str]:
    """Paths of the images below `root`, sorted: hidden files and folders left out, links followed,
    cycles cut.

    Raises: InputError where a folder cannot be listed.
    """
    place = _place(root)
    kept = None if place is None else _read(place, root)
    if kept is not None:
        names = kept.names()
        logger.info(
            "%s: %d images as listed in %s, as nothing changed in its %d folders",
            root,
            len(names),
            place,
            len(kept.folders),
        )
        return names
    started = time.time()
    listing, devices = _walk(root)
    names = listing.names()
    if place is not None:
        _keep(place, root, listing, devices, len(names), started)
    return names


def _walk(root: Path) -> tuple[Listing, set[int]]:
    """What is found, and the devices that it lies on."""
    folders, links = [], []
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        path = waiting.pop()
        images: list[str] = []
        subfolders = []
        try:
            status = (
                root / path
            ).stat()  # before its entries are read: what changes meanwhile changes the state
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(root / path) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if _is_folder(entry):
                            subfolders.append(entry.name)
                            continue
                        if entry.name.lower().endswith(IMAGE_ENDINGS):
                            images.append(entry.name)
                        if entry.is_symlink():
                            links.append(_join(path, entry.name))
        except OSError as error:
            raise InputError(f"cannot list {error.filename}: {error.strerror}") from error
        folders.append(Folder(path, _state(status), images))
        waiting += [_join(path, name) for name in sorted(subfolders, reverse=True)]
    return Listing(folders, links), {device for device, _ in seen}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _state(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _place(root: Path) -> Path | None:
    """The file that keeps the list of a folder, whether or not it is there; None where there is no
    cache folder."""
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache = (
            given if given.is_absolute() else Path.home() / ".cache"
        )  # the XDG rules pass over relative paths
        return (
            cache
            / "mae"
            / "listings"
            / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.list"
        )
    except (OSError, RuntimeError):  # no home folder
        return None


def _header(root: Path) -> dict[str, Any]:
    """What must be equal for a kept list to be looked at."""
    return {"version": VERSION, "root": str(root.resolve()), "endings": list(IMAGE_ENDINGS)}


def _read(place: Path, root: Path) -> Listing | None:
    """The kept list, None where there is none that is whole and up to date."""
    try:
        digest, _, text = place.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(text).hexdigest().encode() != digest:
        logger.info("%s is damaged: %s is listed anew", place, root)
        return None
    content = json.loads(text)
    if content["header"] != _header(root):
        return None
    listing = Listing([Folder(*folder) for folder in content["folders"]], content["links"])
    return listing if _is_current(root, listing) else None


def _is_current(root: Path, listing: Listing) -> bool:
    """Whether listing anew would find the same."""
    devices = set()
    for folder in listing.folders:
        status = _folder_status(root / folder.path)
        if status is None or _state(status) != folder.state:
            return False
        devices.add(status.st_dev)
    return _keep_times(devices) and all(
        _folder_status(root / link) is None for link in listing.links
    )


def _folder_status(path: Path) -> os.stat_result | None:
    """None where there is no folder."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status if stat.S_ISDIR(status.st_mode) else None


def _keep_times(devices: set[int]) -> bool:
    """Whether these devices are known to give a folder another time with each change. Only Linux
    tells what they are.

    On Btrfs a folder's device is not the one that is mounted, so it counts as not known.
    """
    kinds = {}
    try:
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            mount, _, kind = line.decode(errors="replace").partition(" - ")
            major, _, minor = mount.split()[2].partition(":")
            kinds[os.makedev(int(major), int(minor))] = kind.split()[0]
    except OSError:
        return False
    return all(kinds.get(device) in KEEP_TIMES for device in devices)


def _keep(
    place: Path, root: Path, listing: Listing, devices: set[int], num_images: int, started: float
) -> None:
    """Keeps a list, found from the time `started` on, where that pays and is safe; says why where
    it cannot be."""
    looks = len(listing.folders) + len(listing.links)
    if num_images < KEPT_FROM or looks * KEPT_SHARE > num_images:
        return
    latest = max(max(folder.state[1:]) for folder in listing.folders)
    if latest > (started - RECENT_S) * 1e9:
        logger.info(
            "the list of %s is not kept: a folder was changed less than %g s ago", root, RECENT_S
        )
        return
    if not _keep_times(devices):
        logger.info(
            "the list of %s is not kept: its file system is not known to keep folders' times", root
        )
        return
    text = json.dumps(
        {"header": _header(root), "folders": listing.folders, "links": listing.links}
    ).encode()
    content = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    # Every process of a job may write at the same time: each under a name of its own, and the last
    # one stays.
    own = place.with_name(f"{place.name}.{secrets.token_hex(8)}")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_temporary(own, lambda target: target.write_bytes(content)).replace(place)
        _remove_leftovers(place)
    except OSError as error:
        logger.info("the list of %s is not kept: %s", root, error)


def _remove_leftovers(place: Path) -> None:
    """Removes what processes that were killed while they wrote have left."""
    for leftover in place.parent.glob(f"{place.name}.*{TEMPORARY}"):
        with suppress(OSError):  # another process may do the same
            if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
                leftover.unlink()
