"""Images by address: fetched within limits from the web and from buckets, and read from zip archives of this machine.

One thread with an event loop asks for all of them. Whoever needs an image waits for it in a thread of its own, which
takes no processor: a run has as many threads more as images may be under way at once, and those that decode take turns,
so that no more do at once than there are cores.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nbfeat.errors import ImageError
from nbfeat.images import download
from nbfeat.images.archives import Archives
from nbfeat.images.buckets import Buckets
from nbfeat.images.download import Asked, Limits
from nbfeat.images.formats import short
from nbfeat.images.public_hosts import ARCHIVE, WEB, are_private_allowed, check, redact_url, scheme_of

if TYPE_CHECKING:
    import aiohttp

LIMITS = Limits()
_NEEDED = {"http": [], "https": [], "s3": ["fsspec", "s3fs"], "gs": ["fsspec", "gcsfs"]}  # beside aiohttp


@dataclass(frozen=True, slots=True)
class Access:
    """What may be fetched, as it was decided where a run was asked for: wherever its images are fetched, it holds."""

    limits: Limits
    private: bool  # whether private machines may be connected to

    @classmethod
    def here(cls, limits: Limits | None = None) -> Self:
        """Return what this process may fetch."""
        return cls(limits or LIMITS, are_private_allowed())


class Fetcher:
    """Gets images by address until it is closed; threads may call it at once. Paths of archives start at `root`.

    Closing it cancels what is under way, so that nobody waits any longer.
    """

    def __init__(self, root: Path, access: Access | None = None) -> None:
        self.access = access or Access.here()
        self._archives = Archives(root, self.access.limits.size)
        self._line: _Line | None = None
        self._turn = threading.Lock()
        self._is_closed = False

    def __call__(self, address: str) -> bytes:
        """Return the bytes of the image at `address`; raise ImageError with the reason why not."""
        scheme = check(address)
        if scheme == ARCHIVE:
            return self._archives(address)
        for module in ["aiohttp", *_NEEDED[scheme]]:
            if find_spec(module) is None:
                raise ImageError(f"{scheme}: addresses need {module}, which is not here: pip install 'nbfeat[remote]'")
        try:
            return self._asked_for(address).result()
        except CancelledError:
            raise ImageError(short(f"the run was stopped before it was fetched: {redact_url(address)}")) from None

    def _asked_for(self, address: str) -> Future[bytes]:
        with self._turn:  # so that nothing is asked of a loop that has ended, which would never answer
            if self._is_closed:
                raise CancelledError
            if self._line is None:
                self._line = _Line(self.access)
            return self._line.ask(address)

    def close(self) -> None:
        """Cancel what is under way, close all connections and archives, and end the thread."""
        with self._turn:
            self._is_closed = True
            line, self._line = self._line, None
        if line is not None:
            line.close()
        self._archives.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Line:
    """The thread with the event loop, and the connections that are kept in it."""

    def __init__(self, access: Access) -> None:
        self.limits, self._private = access.limits, access.private
        self._places = asyncio.Semaphore(self.limits.at_once)
        self._stop = asyncio.Event()
        self._buckets = Buckets(self.limits, private=self._private)
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._lookups = ThreadPoolExecutor(self.limits.at_once, thread_name_prefix="nbfeat-lookup")  # of hosts
        self._loop.set_default_executor(self._lookups)
        self._thread = threading.Thread(target=self._work, name="nbfeat-fetch", daemon=True)
        self._thread.start()

    def ask(self, address: str) -> Future[bytes]:
        """Return what will be the bytes of an image."""
        return asyncio.run_coroutine_threadsafe(self._fetched(address), self._loop)

    def close(self) -> None:
        """Cancel what is under way, and end the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)  # after all that was asked for
        self._thread.join()

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._until_stopped())
        finally:
            # The system's look-up of a host cannot be interrupted: a thread of its own ends when that does.
            self._lookups.shutdown(wait=False, cancel_futures=True)
            self._loop.close()

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        under_way = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        await self._buckets.close()

    async def _fetched(self, address: str) -> bytes:
        async with self._places:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    if self._session is None:
                        self._session = download.session(self.limits, private=self._private)
                    return await download.get(self._session, await self._asked(address), self.limits)
            except TimeoutError:
                raise ImageError(
                    short(f"not fetched within {self.limits.seconds:g} s: {redact_url(address)}")
                ) from None

    async def _asked(self, address: str) -> Asked:
        return Asked(address, redact_url(address)) if scheme_of(address) in WEB else await self._buckets.asked(address)
