"""A Dask cluster as a backend of joblib; imported by `bdutils.sweep` only when asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future

try:
    from distributed import Client
    from joblib._dask import DaskDistributedBackend
except ImportError as error:
    raise ImportError("a cluster needs Dask: run `pip install distributed`") from error

TIMEOUT = 10  # seconds for a scheduler to answer


class Backend(DaskDistributedBackend):
    """joblib's backend, mended: it would wait forever for a task that Dask or its scheduler lost.

    Here the error comes back as the task's outcome. And with one worker joblib's would do the
    work in the client's process, as if there were no cluster.
    """

    def effective_n_jobs(self, n_jobs: int = 1) -> int:
        """Return the number of workers, at least 2."""
        return max(2, super().effective_n_jobs(n_jobs))

    def start_call(self) -> None:
        """Begin to submit tasks, and to watch the connection."""
        self.open: dict[Future, Callable] = {}
        super().start_call()
        self.client.loop.add_callback(self._watch, self.client.scheduler_comm)

    async def _watch(self, comm: object) -> None:
        while self._continue:
            await asyncio.sleep(0.2)
            # Dask's client makes a new connection by itself, but its old tasks are gone; if one's
            # result was on its way, nobody would ever hear of it.
            if self.client.scheduler_comm is not comm:
                self.abort_everything()
                for future in list(self.open):
                    future.set_exception(RuntimeError("the connection to the scheduler was lost"))

    def submit(self, func: Callable, callback: Callable | None = None) -> Future:
        """Submit a task, and see to it that an error ends it."""
        future = super().submit(func, callback)
        self.open[future] = callback
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: Future) -> None:
        callback = self.open.pop(future)
        if future.exception():
            callback(future.exception())

    def retrieve_result_callback(self, out: object) -> list:
        """Return the results of a task; the error itself if Dask has none."""
        return [out] if isinstance(out, BaseException) else super().retrieve_result_callback(out)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Backend]:
    """Connect to a Dask scheduler.

    Args:
        address: Of the scheduler, `tcp://HOST:PORT`.

    Returns:
        A context that gives a backend for joblib and closes the connection at its end.

    Raises:
        ConnectionError: If no scheduler answers.
        ValueError: If a worker has several threads.
    """
    try:
        client = Client(address, timeout=TIMEOUT, set_as_default=False)
    except OSError as error:
        raise ConnectionError(f"no Dask scheduler answers at {address}: start one by `dask "
                              "scheduler`, and give the address that it prints") from error
    with client:
        if max(client.nthreads().values(), default=1) > 1:
            raise ValueError(f"a worker of {address} has several threads, but runs share what is "
                             "global in a process: start it by `dask worker ADDRESS --nthreads 1`")
        yield Backend(client=client)
