"""One image of the web → its bytes, within limits, or the reason why not.

Nothing is read beyond a limit, whatever the server says of itself: the body is taken in pieces and never decompressed,
each redirect is looked at before it is followed, and one deadline holds for all tries together.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urljoin

from nbfeat.errors import ImageError
from nbfeat.images.formats import short
from nbfeat.images.public_hosts import PRIVATE, WEB, PrivateMachineError, public_socket, scheme_of

if TYPE_CHECKING:
    import aiohttp
    import yarl

AGENT = "nbfeat (+https://github.com/nbfeat/nbfeat)"
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TOO_MANY = 429
SERVER_ERROR = 500
MEGABYTE = 1_000_000
_REASONS = {401: "permission denied", 403: "permission denied", 404: "not found", 410: "not found"}
_NO_SUCH_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_WRITTEN_OUT = re.compile(r"[!-~]+")  # an address with nothing left to be quoted

_chance = random.SystemRandom()  # the user's own generator is left alone


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of anything one image may take."""

    size: int = 64 * MEGABYTE  # bytes
    answering: float = 10.0  # seconds to look a host up and connect to it, and between two pieces of the answer
    seconds: float = 120.0  # in all: connecting, redirects, further tries and what is waited between them
    redirects: int = 5
    tries: int = 3
    pause: float = 0.5  # seconds before the second try, twice as long before the third; more or less, by chance
    longest_pause: float = 30.0  # that a server may ask for
    at_once: int = 16  # images


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a server: how to name it in sentences, and headers that no other server may see."""

    url: str
    name: str
    headers: Mapping[str, str] = field(default_factory=dict)


class _TransientError(Exception):
    """Another try may do better, `after` so many seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def session(limits: Limits, *, private: bool) -> aiohttp.ClientSession:
    """Return what connections are kept in; it has to be closed.

    Neither proxies, cookies nor passwords of the environment are used. Unless `private` machines are allowed, each
    address is checked as it is connected to.
    """
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, socket_factory=None if private else public_socket)
    # The deadline is ours: the library's begins anew with each redirect.
    timeout = aiohttp.ClientTimeout(total=None, connect=limits.answering, sock_read=limits.answering)
    headers = {"User-Agent": AGENT, "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"}
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False, trust_env=False,
    )  # fmt: skip


async def get(session: aiohttp.ClientSession, asked: Asked, limits: Limits) -> bytes:
    """Return the bytes of an image; raise ImageError with the reason why not."""
    reason = ""
    for number in range(limits.tries):
        try:
            return await _get(session, asked, limits)
        except _TransientError as error:
            reason = str(error)
            after = limits.pause * 2**number * _chance.uniform(0.5, 1.5) if error.after is None else error.after
        if after > limits.longest_pause:
            reason = f"{reason}; it asks to come back in {after:,.0f} s"
            break
        if number + 1 < limits.tries:
            await asyncio.sleep(after)
    return _fail(reason, asked)


def _fail(reason: str, asked: Asked) -> NoReturn:
    raise ImageError(short(f"{reason}: {asked.name}")) from None


async def _get(session: aiohttp.ClientSession, asked: Asked, limits: Limits) -> bytes:
    """Try once, following redirects."""
    url, headers = _url(asked.url, asked), asked.headers
    for _ in range(limits.redirects + 1):
        try:
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    _check(response, asked, limits)
                    return await _body(response, asked, limits)
                further = _redirected(url, response.headers["Location"], asked)
        except (ImageError, _TransientError, asyncio.CancelledError):
            raise
        except Exception as error:  # each of the library's and the system's has its sentence
            _explain(error, asked, limits)
        if further.origin() != url.origin():
            headers = {}
        url = further
    return _fail(f"redirected more than {limits.redirects} times", asked)


def _url(text: str, asked: Asked) -> yarl.URL:
    """Read an address, leaving what is quoted as it is: a signature holds for what was signed."""
    import yarl

    try:
        url = yarl.URL(text, encoded=bool(_WRITTEN_OUT.fullmatch(text)))
        if url.host:
            return url
    except ValueError:
        pass
    return _fail("no address that could be asked for", asked)


def _redirected(url: yarl.URL, location: str, asked: Asked) -> yarl.URL:
    """Return where a redirect leads, if it may be followed."""
    scheme = scheme_of(location) or url.scheme
    if scheme not in WEB:
        _fail(f"redirected to {scheme}:, which is not followed", asked)
    if url.scheme == "https" and scheme == "http":
        _fail("redirected from https to http, which is not followed", asked)
    return _url(urljoin(str(url), location), asked)


def _check(response: aiohttp.ClientResponse, asked: Asked, limits: Limits) -> None:
    """Fail where the answer is no image to be read, by its status and headers."""
    status = response.status
    if status == TOO_MANY or status >= SERVER_ERROR:
        reason = f"the server answers {_phrase(status)}"
        raise _TransientError(reason, _asked_to_wait(response.headers.get("Retry-After", "")))
    if status != HTTPStatus.OK:
        _fail(
            f"{_REASONS[status]} ({status})" if status in _REASONS else f"the server answers {_phrase(status)}", asked
        )
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in {"", "identity"}:
        _fail("the answer is compressed, though that was not asked for, and is not read", asked)
    if (response.content_length or 0) > limits.size:
        _fail(_too_large(limits), asked)


async def _body(response: aiohttp.ClientResponse, asked: Asked, limits: Limits) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > limits.size:
            _fail(_too_large(limits), asked)
    if not data:
        _fail("the answer is empty", asked)
    return bytes(data)


def _too_large(limits: Limits) -> str:
    return f"larger than {limits.size / MEGABYTE:g} MB, the most that is fetched of an image"


def _phrase(status: int) -> str:
    try:
        return f"{status} ({HTTPStatus(status).phrase.lower()})"
    except ValueError:
        return str(status)


def _asked_to_wait(text: str) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for, which may be a date; None where it asks for nothing."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _explain(error: Exception, asked: Asked, limits: Limits) -> NoReturn:
    """Turn what was raised into a sentence, and say whether to try again."""
    import aiohttp

    if private := _private(error):
        _fail(f"{private} is a private address, which is only connected to where {PRIVATE}=1 is set", asked)
    system = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    match error:
        case TimeoutError():
            _try_again(f"no answer within {limits.answering:g} s")
        case aiohttp.ClientConnectorCertificateError():
            _fail("the server's certificate is not valid", asked)
        case aiohttp.ClientSSLError():
            _fail("no secure connection could be made", asked)
        case aiohttp.ClientConnectorDNSError() if getattr(system, "errno", None) in _NO_SUCH_HOST:
            _fail("no such host", asked)
        case aiohttp.ClientConnectorDNSError():
            _try_again("the host could not be looked up")
        case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | OSError():
            number = 0 if isinstance(system, ssl.SSLError) else getattr(system, "errno", None) or 0
            told = os.strerror(number).lower() if number in errno.errorcode else ""  # its own words show addresses
            _try_again(f"the connection failed ({told})" if told else "the connection was lost")
        case aiohttp.InvalidURL() | ValueError():
            _fail("no address that could be asked for", asked)
    _fail("the server's answer is none of HTTP", asked)


def _try_again(reason: str) -> NoReturn:
    raise _TransientError(reason) from None


def _private(error: BaseException | None) -> str:
    """Return the private machine that a connection was refused to, however deep that is wrapped, or ""."""
    while error is not None:
        if isinstance(error, PrivateMachineError):
            return str(error)
        error = getattr(error, "os_error", None) or error.__cause__
    return ""
