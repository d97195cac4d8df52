"""A slot of a global concurrency limit of the Prefect server, held while something scarce is used."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


@contextmanager
def held(limit: str | None) -> Iterator[None]:
    """Wait for a slot and hold it; without a limit nothing is asked. A holder that dies loses it after five minutes.

    Raises LookupError, saying how to make it, where the server has no such limit: going on without would crowd the GPU.
    """
    if limit is None:
        yield
        return
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    with ExitStack() as stack:
        try:
            # A renewal that fails once must not end hours of training: the slot is asked for again in the next one.
            stack.enter_context(concurrency(limit, strict=True, raise_on_lease_renewal_failure=False))
        except ConcurrencySlotAcquisitionError as error:
            raise LookupError(
                f"the Prefect server gives no slot of the global concurrency limit {limit!r}: "
                f"make it with `prefect global-concurrency-limit create {limit} --limit 1` ({error})"
            ) from error
        yield


def training_slot(limit: str | None) -> AbstractContextManager[None]:
    """What every training, search and judging by a network holds: a slot of the named limit; of `gpu` where none is named and
    there is a GPU; else nothing.
    """
    from tasks.machine import accelerator

    return held(limit or ("gpu" if accelerator().type == "cuda" else None))
