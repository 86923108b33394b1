"""A URL → the bytes of its image, fetched from the web or a bucket within limits, or read from a zip archive.

One thread with an event loop sends all requests; threads that need an image wait for it. No limit relies on what a
server says: bodies are read in pieces and never decompressed, redirects are checked, and all tries share one deadline.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import socket
import ssl
import stat
import threading
import time
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urljoin

from nbfeat.errors import ImageError
from nbfeat.images import public_hosts
from nbfeat.images.decode import file_reason, size_objection
from nbfeat.images.public_hosts import ARCHIVE, PRIVATE, WEB, public_socket, redact_url, scheme_of

if TYPE_CHECKING:
    import aiohttp
    import yarl

AGENT = "nbfeat (+https://github.com/nbfeat/nbfeat)"
MEGABYTE = 1_000_000
REDIRECTS = {301, 302, 303, 307, 308}
SECONDS_SIGNED = 900  # validity of a signature, longer than a download may take
GOOGLE = "https://storage.googleapis.com"
MOST_OPEN = 8  # archives; reading the directory of a large one takes longer than an image
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # decoders of others return all at once, even 1 GB from 1 kB

_NEEDED = dict.fromkeys(WEB, "aiohttp") | {"s3": "aiohttp fsspec s3fs", "gs": "aiohttp fsspec gcsfs", ARCHIVE: ""}
_REASONS = {401: "permission denied", 403: "permission denied", 404: "not found", 410: "not found"}
_PHRASES = {status.value: f" ({status.phrase.lower()})" for status in HTTPStatus}
_NO_SUCH_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_WRITTEN_OUT = re.compile(r"[!-~]+")  # a URL with nothing left to quote
_chance = random.SystemRandom()  # doesn't touch the user's generator


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for one image."""

    size: int = 64 * MEGABYTE  # bytes
    answering: float = 10.0  # seconds to connect, and between two pieces of the answer
    seconds: float = 120.0  # in total, with redirects, further tries and the pauses between them
    redirects: int = 5
    tries: int = 3
    pause: float = 0.5  # seconds before the second try, twice that before the third, with jitter
    longest_pause: float = 30.0  # that a server may ask for
    at_once: int = 16  # images


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Access:
    """What may be fetched, as decided in the process that requested the run."""

    limits: Limits
    private: bool  # whether private hosts are allowed

    @classmethod
    def here(cls, limits: Limits | None = None) -> Self:
        """Return the access of this process."""
        return cls(limits or LIMITS, public_hosts.are_private_allowed())


class Fetcher(AbstractContextManager["Fetcher"]):
    """Fetches images from URLs until it is closed; thread-safe. Paths of archives start at `root`."""

    def __init__(self, root: Path, access: Access | None = None) -> None:
        access = access or Access.here()
        self.root, self.limits, self.private = root, access.limits, access.private
        self._archive_at = lru_cache(MOST_OPEN)(_archive)
        self._turn, self._is_closed = threading.Lock(), False
        self._places, self._signing = asyncio.Semaphore(self.limits.at_once), asyncio.Lock()
        self._opened = AsyncExitStack()  # the connections of all
        self._session: aiohttp.ClientSession | None = None
        self._buckets: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._lookups = ThreadPoolExecutor(self.limits.at_once, thread_name_prefix="nbfeat-lookup")  # of hosts
        self._loop.set_default_executor(self._lookups)
        self._thread = threading.Thread(target=self._loop.run_forever, name="nbfeat-fetch", daemon=True)
        self._thread.start()

    def __call__(self, address: str) -> bytes:
        """Return the bytes of the image at `address`, or raise ImageError with the reason."""
        scheme = public_hosts.check(address)
        if missing := [module for module in _NEEDED[scheme].split() if find_spec(module) is None]:
            raise ImageError(f"{scheme}: URLs need {missing[0]}, which isn't installed: pip install {missing[0]}")
        stopped = ImageError(f"the run stopped before it was fetched: {redact_url(address)}")
        with self._turn:  # a loop that has ended would never answer
            if self._is_closed:
                raise stopped
            is_web = scheme != ARCHIVE
            asked = asyncio.run_coroutine_threadsafe(self._fetch(address), self._loop) if is_web else None
        try:
            return asked.result() if asked else self._member(address)
        except CancelledError:
            raise stopped from None

    def _member(self, address: str) -> bytes:
        member, path = _member_and_archive(address, self.root)
        if not member:
            raise ImageError("zip URLs need an archive on this machine: zip://image.jpg::folder/archive.zip")
        try:
            archive, most = self._archive_at(path), self.limits.size
            if (info := archive.NameToInfo.get(member)) is None:
                raise ImageError(f"no such member of the archive: {member} in {path}")
            objection = (
                "a folder, not a file" if info.is_dir()
                else "encrypted" if info.flag_bits & 1
                else "compressed by a method other than deflate" if info.compress_type not in METHODS
                else size_objection(info.file_size, most)
            )  # fmt: skip
            if objection:
                raise ImageError(f"{objection}: {member} in {path}")
            with archive.open(info) as file:  # it ends at the size that the archive states
                return file.read(most)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error):
            reason = "the archive is damaged or isn't a zip file"
        except (OSError, ValueError) as error:
            reason = file_reason(error, "archive")
        raise ImageError(f"{reason}: {path}")

    def close(self) -> None:
        """Cancel open requests, close connections and archives, and end the thread."""
        with self._turn:
            if self._is_closed:
                return
            self._is_closed = True
        cancelling = asyncio.run_coroutine_threadsafe(self._cancel(), self._loop)
        cancelling.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        self._thread.join()
        # The system's host lookup can't be interrupted: its thread ends when it does.
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._loop.close()
        self._archive_at.cache_clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _cancel(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._opened.aclose()

    async def _fetch(self, address: str) -> bytes:
        async with self._places:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    is_web = scheme_of(address) in WEB
                    return await self._get(*((address, {}) if is_web else await self._signed(address)))
            except TimeoutError:
                reason = f"not fetched within {self.limits.seconds:g} s"
            except ImageError as error:
                reason = str(error)
        raise ImageError(f"{reason}: {redact_url(address)}")

    async def _get(self, address: str, headers: Mapping[str, str]) -> bytes:
        """Return the content of a URL, with several tries; no other server may see the `headers`."""
        limits, url, tries = self.limits, _url(address), 0
        while True:
            try:
                return await self._get_once(url, headers)
            except _TransientError as error:
                after = limits.pause * 2**tries * _chance.uniform(0.5, 1.5) if error.after is None else error.after
                if after > limits.longest_pause:
                    raise ImageError(f"{error}; retry after {after:,.0f} s") from None
                tries += 1
                if tries == limits.tries:
                    raise
            await asyncio.sleep(after)

    async def _get_once(self, url: yarl.URL, headers: Mapping[str, str]) -> bytes:
        session = self._session = self._session or self._new_session()
        for _ in range(self.limits.redirects + 1):
            try:
                async with session.get(url, headers=headers, allow_redirects=False) as response:
                    if response.status not in REDIRECTS or "Location" not in response.headers:
                        return await self._body(response)
                    further = _redirected(url, response.headers["Location"])
            except Exception as error:  # from the library or the system
                raise error if isinstance(error, ImageError) else _explained(error, self.limits) from None
            headers = headers if further.origin() == url.origin() else {}
            url = further
        raise ImageError(f"redirected more than {self.limits.redirects} times")

    def _new_session(self) -> aiohttp.ClientSession:
        """Return a session without proxies, cookies or passwords from the environment."""
        import aiohttp

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=None if self.private else public_socket),
            # We keep the deadline ourselves: the library's restarts with each redirect.
            timeout=aiohttp.ClientTimeout(None, connect=self.limits.answering, sock_read=self.limits.answering),
            headers={"User-Agent": AGENT, "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False,
        )  # fmt: skip
        self._opened.push_async_exit(session)
        return session

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        status, words = response.status, f"the server answers {response.status}{_PHRASES.get(response.status, '')}"
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _TransientError(words, _asked_to_wait(response.headers.get("Retry-After", "")))
        if status != HTTPStatus.OK:
            raise ImageError(f"{_REASONS[status]} ({status})" if status in _REASONS else words)
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in {"", "identity"}:
            raise ImageError("the answer is compressed, which wasn't requested")
        data = bytearray()
        if (response.content_length or 0) <= (most := self.limits.size):
            while len(data) <= most and (piece := await response.content.readany()):
                data += piece
        if max(response.content_length or 0, len(data)) > most:
            raise ImageError(f"larger than {most / MEGABYTE:g} MB, the limit for an image")
        if not data:
            raise ImageError("the answer is empty")
        return bytes(data)

    async def _signed(self, address: str) -> tuple[str, Mapping[str, str]]:
        """Return the URL and headers to request an image in a bucket; fsspec only signs them, so that limits hold."""
        scheme, (bucket, _, key) = scheme_of(address), address.partition("://")[2].partition("/")
        if not bucket or not key:
            raise ImageError("the URL of a bucket, not of an image in it")
        headers: dict[str, str] = {}
        try:
            async with self._signing:
                if scheme not in self._buckets:
                    self._buckets[scheme] = await (self._s3() if scheme == "s3" else asyncio.to_thread(self._gs))
            system = self._buckets[scheme]
            if scheme == "s3":
                return await system._url(f"{bucket}/{key}", expires=SECONDS_SIGNED), headers  # `url` blocks
            await asyncio.to_thread(system.credentials.apply, headers)
            return system.url(f"{bucket}/{key}"), headers
        except Exception as error:  # hundreds of kinds, and their messages may contain secrets
            raise ImageError(f"{scheme}: the URL can't be signed ({type(error).__name__})") from None

    async def _s3(self) -> Any:
        import fsspec

        # Buckets made since 2020 refuse older signatures.
        config: dict[str, Any] = {"signature_version": "s3v4", "retries": {"total_max_attempts": self.limits.tries}}
        config |= dict.fromkeys(("connect_timeout", "read_timeout"), self.limits.answering)
        options: dict[str, Any] = {"config_kwargs": config, "cache_regions": True}  # to find the region of a bucket
        if not self.private:  # no other endpoint from the environment or configuration files
            config |= {"ignore_configured_endpoint_urls": True, "proxies": {}}
            options |= {"endpoint_url": None, "client_kwargs": {}}
        await asyncio.to_thread(fsspec.get_filesystem_class, "s3")  # importing it takes seconds
        for more in ({}, {"anon": True}):
            system = fsspec.filesystem("s3", asynchronous=True, skip_instance_cache=True, **options, **more)
            await system.set_session()
            self._opened.push_async_exit(system._s3creator)  # the only way to close all its connections
            if system.anon or system.key or await system.session.get_credentials() is not None:
                break
        return system

    def _gs(self) -> Any:
        import fsspec

        options = {} if self.private else {"endpoint_url": GOOGLE}
        return fsspec.filesystem("gs", asynchronous=True, skip_instance_cache=True, access="read_only", **options)


def _archive(path: str) -> zipfile.ZipFile:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError(f"a folder, pipe or device, not an archive: {path}")
    return zipfile.ZipFile(path)  # closes itself when unused


def absolute(address: str, root: Path) -> str:
    """Return the URL of an archive with an absolute path; others unchanged."""
    member, path = _member_and_archive(address, root)
    return f"{ARCHIVE}://{member}::{path}" if member else address


def _member_and_archive(address: str, root: Path) -> tuple[str, str]:
    """Return the member and path of a local archive; empty for other URLs."""
    member, _, archive = address.partition("://")[2].partition("::")
    is_chain = "::" in archive and not os.path.isabs(archive)  # an absolute path may go through such a folder
    if scheme_of(address) != ARCHIVE or not member or not archive or is_chain or scheme_of(archive):
        return "", ""
    return member, os.path.join(root, os.path.expanduser(archive))


class _TransientError(ImageError):
    """Another try may succeed, after `after` seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def _url(text: str, base: str = "") -> yarl.URL:
    """Parse a URL without changing its quoting, which may be signed."""
    import yarl

    with suppress(ValueError):
        url = yarl.URL(urljoin(base, text), encoded=bool(_WRITTEN_OUT.fullmatch(text)))
        if url.host:
            return url
    raise ImageError("not a valid URL")


def _redirected(url: yarl.URL, location: str) -> yarl.URL:
    if (scheme := scheme_of(location) or url.scheme) not in WEB or (url.scheme, scheme) == ("https", "http"):
        what = f"to {scheme}:" if scheme not in WEB else "from https to http"
        raise ImageError(f"redirected {what}, which isn't allowed")
    return _url(location, str(url))


def _asked_to_wait(text: str) -> float | None:
    """Return the seconds of a ``Retry-After``, which may be a date."""
    if text.strip().isdecimal():
        return float(text)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _explained(error: Exception, limits: Limits) -> ImageError:
    """Return an ImageError for `error`: a _TransientError if another try may succeed."""
    import aiohttp

    cause: BaseException | None = error
    while cause is not None:  # the refusal may be wrapped
        if isinstance(cause, public_hosts.PrivateMachineError):
            return ImageError(f"{cause} is a private address: set {PRIVATE}=1 to allow it")
        cause = getattr(cause, "os_error", None) or cause.__cause__
    system = getattr(error, "os_error", error)  # the library's own messages contain URLs
    number = 0 if isinstance(system, ssl.SSLError) else getattr(system, "errno", None) or 0
    lost = f"the connection failed ({os.strerror(number).lower()})" if number in errno.errorcode else ""
    for kinds, reason, may_pass in (
        (TimeoutError, f"no answer within {limits.answering:g} s", True),
        (aiohttp.ClientConnectorCertificateError, "the server's certificate isn't valid", False),
        (aiohttp.ClientSSLError, "no secure connection is possible", False),
        (aiohttp.ClientConnectorDNSError if number in _NO_SUCH_HOST else (), "no such host", False),
        (aiohttp.ClientConnectorDNSError, "the host lookup failed", True),
        ((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError), lost or "the connection was lost", True),
        (ValueError, "not a valid URL", False),
    ):
        if isinstance(error, kinds):
            return (_TransientError if may_pass else ImageError)(reason)
    return ImageError("the server's answer isn't HTTP")
