"""The batches of an evaluation, which leaves no image out: all processes end together."""

from collections.abc import Iterable, Iterator

from data.loader import BadSample, Batch
from engine.run.interrupts import Stopped, received
from util.dist import all_gather
from util.errors import DataError


def complete_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This process's batches; all processes must go on to the end, where they wait for one another.

    Raises: DataError at the end on all processes if one met a file that cannot be decoded,
        Stopped if one got a signal; that process's batches end there.
    """
    bad: list[BadSample] = []
    for batch in batches:
        bad += batch.bad
        if batch.bad or received():
            break
        yield batch
    ends = all_gather((bad, received()))
    for samples, _ in ends:
        for path, reason in samples:
            raise DataError(
                f"evaluation leaves no image out, and {path} {reason}: mend or remove the file"
            )
    if signum := max(signum for _, signum in ends):
        raise Stopped(signum)
