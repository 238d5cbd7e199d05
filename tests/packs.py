"""Small packs for tests: made by the tool, or written by hand as others might."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tools import pack_dataset
from util.errors import InputError

SMALL = ("--shard_mb", 0.05, "--workers", 1)  # about 20 digits a shard
PACKED = ("--dataset", "packed")


def pack(source: Path, target: Path, *more) -> Path:
    pack_dataset.main([str(source), str(target), *map(str, (*SMALL, *more))])
    return target


def index_tars(*paths: Path) -> int:
    (count,) = pack_dataset.main(["--index", *map(str, paths), "--workers", "1"]).values()
    return count


def refused(*arguments) -> str:
    """What the tool says, in one line."""
    with pytest.raises(InputError) as error:
        pack_dataset.main([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Killed(BaseException):
    """Ends a process as a kill would: nothing but `finally` runs."""


def saved(image: Image.Image, format: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **facts) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info, content


def write_tar(path: Path, members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def png(shade: int) -> bytes:
    return saved(Image.new("L", (6, 5), shade), "PNG")


def patched(path: Path, offset: int, content: bytes, header: int | None = None) -> Path:
    """Overwrites bytes of a tar file and mends the checksum of the header at `header`."""
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    if header is not None:
        whole[header + 148 : header + 156] = b" " * 8
        whole[header + 148 : header + 156] = b"%06o\0 " % sum(whole[header : header + 512])
    path.write_bytes(whole)
    return path
