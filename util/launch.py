"""torchrun without its own traceback where a process has already said, in one line, what is wrong.

`util/launch.sh` starts it, with torchrun's arguments. A process that ends with the exit code of a
user's mistake (see `util/errors.py`) ends the launcher with it; of any other failure torchrun's
summary is printed, and the exit code is 1.
"""

import logging
import signal
import sys
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import main

MISTAKE = 2


def stop(signum: int, _: FrameType | None) -> None:
    """Ends the launcher as by the signals that torchrun handles itself."""
    raise SignalException(f"got signal {signum}", signal.Signals(signum))


def says_more(record: logging.LogRecord) -> bool:
    """Whether a log record tells more than that a process has ended by a user's mistake, or that
    torchrun stops the others."""
    message = record.getMessage()
    return f"(exitcode: {MISTAKE})" not in message and "closing signal SIGTERM" not in message


if __name__ == "__main__":
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(says_more)
    if not hasattr(LaunchConfig, "signals_to_handle"):  # torch 2.9 has a fixed list without USR1
        place = sys.argv.index("--signals_to_handle")
        del sys.argv[place : place + 2]
        signal.signal(signal.SIGUSR1, stop)
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        if failed.get_first_failure()[1].exitcode == MISTAKE:
            sys.exit(MISTAKE)
        sys.exit(str(failed))  # on stderr, with exit code 1
