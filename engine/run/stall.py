"""What to do about training that waits for its images: one line, once, that names the lever which
fits."""

import logging
from typing import Any

from data.loader import default_num_workers
from util.dist import Processes
from util.pool import available_cores

STALL = 0.1  # share of a window's time; less is hardly worth a change
PACKED_SIDE = 256 / 224  # short side of packed images over the crop's
logger = logging.getLogger(__name__)


class StallMeter:
    """Watches `data_wait` from one log line to the next.

    The first window of a process is left out, as its loader is just starting. After one warning it
    is silent: the settings stay the same for the rest of the run.
    """

    def __init__(self, cfg: Any, processes: Processes):
        self.cfg = cfg
        self.processes = processes
        self.is_first = True
        self.has_spoken = False

    def update(self, data_wait: float) -> None:
        """Takes the share of a window's time, in [0, 1], that this process waited for data."""
        if data_wait > STALL and not self.is_first and not self.has_spoken:
            self.has_spoken = True
            waited = f"{100 * data_wait:.0f} % of the time since the last line went into waiting for images"
            logger.warning(
                "%s: loading is the bottleneck, not the model. %s",
                waited,
                lever(self.cfg, self.processes),
            )
        self.is_first = False


def lever(cfg: Any, processes: Processes) -> str:
    """What would speed up loading under these settings: the cheapest first."""
    here = processes.local_world_size
    cores = available_cores() // here
    workers = default_num_workers(here) if cfg.num_workers is None else cfg.num_workers
    if workers < cores:
        return f"num_workers is {workers} and each process can have {cores} cores: try --num_workers {cores}"
    all_taken = f"num_workers {workers} takes all cores already"
    if cfg.dataset == "folder":
        side = max(cfg.img_size) if isinstance(cfg.img_size, tuple) else cfg.img_size
        side = round(PACKED_SIDE * side)
        packing = f"pack the images with tools/pack_dataset.py --side {side}, which leaves less to read and to decode"
        return f"{all_taken}: for the next run, {packing}"
    if getattr(cfg, "aug_repeats", None) == 1 and cfg.batch_size % 2 == 0:
        return (
            f"{all_taken}: for the next run, try --aug_repeats 2, which decodes half as many images"
        )
    return f"{all_taken}: more of them would help" + (
        ", or a faster disk" if cfg.dataset == "packed" else ""
    )
