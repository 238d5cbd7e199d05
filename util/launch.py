"""torchrun without its own traceback where a process has already said, in one line, what is wrong.

`util/launch.sh` starts it, with torchrun's arguments. A process that ends with the exit code of a
user's mistake (see `util/errors.py`) ends the launcher with it; of any other failure torchrun's
summary is printed, and the exit code is 1.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

MISTAKE = 2
# What torchrun logs of such a process, and of the others when it stops them.
REPEATED = (f"(exitcode: {MISTAKE})", "closing signal SIGTERM")


def says_more(record: logging.LogRecord) -> bool:
    """Whether a log record tells more than that a process has ended."""
    return not any(text in record.getMessage() for text in REPEATED)


if __name__ == "__main__":
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(says_more)
    try:
        main()
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        if code != MISTAKE:
            sys.stderr.write(f"{failed}\n")
        sys.exit(MISTAKE if code == MISTAKE else 1)
