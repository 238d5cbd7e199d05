"""Features of any images, without labels, in one file.

    python tools/embed.py --finetune /path/to/pretrain/model --data_path /path/to/images \\
        --output_file output/features.npz

The model is the encoder of any weights that the project reads, and the file says what it is; no
recipe is needed. `--data_path` is a folder, an image, a text file with a path in each line, or a
parquet file; with `--dataset` also packed shards and known sets. `--output_file` ends in .npz,
.safetensors or .parquet. The same command goes on where a killed one stopped, and torchrun starts
it on several processes.
"""

import json
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.parquet import import_parquet
from engine.evaluation.apply import Parts, apply_model
from engine.evaluation.readers import feature_reader
from util.errors import run_cli
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import EmbedConfig

NAMES = "names"


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Writes the features; returns what `apply_model` does."""
    cfg = load_config(EmbedConfig, "embed", argv, siblings=STAGE_CONFIGS)
    assert cfg.output_file is not None, "the config checks that there is one"
    write = WRITERS[Path(cfg.output_file).suffix]
    if write is write_parquet:
        import_parquet()  # says what is missing before any compute
    return apply_model(cfg, False, feature_reader, write)


def write_safetensors(parts: Parts, path: Path) -> None:
    """The arrays, and the names as one text in UTF-8 with a line break after each, as bytes."""
    names, start = "".join(f"{name}\n" for name in parts.names()).encode(), 0
    header: dict[str, object] = {"__metadata__": {"format": "pt", "origin": parts.identity}}
    for name, shape in parts.shapes().items():
        end = start + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    end = start + len(names)
    header[NAMES] = {"dtype": "U8", "shape": [len(names)], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in parts.shapes():
            for rows in parts.chunks(name):
                file.write(rows.tobytes())
        file.write(names)


def write_npz(parts: Parts, path: Path) -> None:
    """The arrays for `np.load`, `names` among them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in parts.shapes().items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                described = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, described)
                for rows in parts.chunks(name):
                    file.write(rows.tobytes())
        for name, content in ((NAMES, parts.names()), ("origin", parts.identity)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.array(content), allow_pickle=False)


def write_parquet(parts: Parts, path: Path) -> None:
    """A row for each image: its name, and each feature as a list; several patches one after the
    other."""
    parquet = import_parquet()
    import pyarrow

    names, shapes, start = parts.names(), parts.shapes(), 0
    lists = {n: pyarrow.list_(pyarrow.float32(), int(np.prod(s[1:]))) for n, s in shapes.items()}
    schema = pyarrow.schema({NAMES: pyarrow.string(), **lists}, {"origin": parts.identity})
    with parquet.ParquetWriter(path, schema) as writer:
        for of_arrays in zip(*map(parts.chunks, shapes), strict=True):
            end = start + len(of_arrays[0])
            columns = [
                pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), type=kind)
                for rows, kind in zip(of_arrays, lists.values(), strict=True)
            ]
            writer.write_table(pyarrow.table([names[start:end], *columns], schema=schema))
            start = end


WRITERS = {".safetensors": write_safetensors, ".npz": write_npz, ".parquet": write_parquet}


if __name__ == "__main__":
    run_cli(lambda: sys.exit(main()["exit_code"] == 1))
