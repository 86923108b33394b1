"""What to ask of the web for an image in a bucket of Amazon S3 or Google Cloud Storage.

The file systems of fsspec find credentials, as they do for pandas, and sign; they read nothing themselves, so that the
limits of a download hold for images in buckets too. Without credentials buckets are asked as anybody may ask them.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from nbfeat.errors import ImageError
from nbfeat.images.download import Asked, Limits
from nbfeat.images.formats import short
from nbfeat.images.public_hosts import redact_url, scheme_of

SECONDS_SIGNED = 900  # that a signature holds: more than a download may take
GOOGLE = "https://storage.googleapis.com"


class Buckets:
    """Turns addresses of buckets into what to ask; other endpoints than the clouds' own only where `private`."""

    def __init__(self, limits: Limits, *, private: bool) -> None:
        self.limits, self.private = limits, private
        self._turn = asyncio.Lock()
        self._systems: dict[str, Any] = {}
        self._opened = AsyncExitStack()

    async def asked(self, address: str) -> Asked:
        """Return the request for an image; raise ImageError where it cannot be signed."""
        scheme, name = scheme_of(address), redact_url(address)
        bucket, _, key = address.partition("://")[2].partition("/")
        if not bucket or not key:
            raise ImageError(short(f"an address of a bucket, not of an image in it: {name}"))
        try:
            system = await self._system(scheme)
            if scheme == "s3":
                return Asked(await system._url(f"{bucket}/{key}", expires=SECONDS_SIGNED), name)  # `url` blocks
            headers: dict[str, str] = {}
            await asyncio.to_thread(system.credentials.apply, headers)
            return Asked(system.url(f"{bucket}/{key}"), name, headers)
        except Exception as error:  # of hundreds; and what they say may show what nobody should see
            raise ImageError(short(f"{scheme}: addresses cannot be signed ({type(error).__name__}): {name}")) from None

    async def close(self) -> None:
        """Close what was opened."""
        await self._opened.aclose()

    async def _system(self, scheme: str) -> Any:
        async with self._turn:
            if scheme not in self._systems:
                self._systems[scheme] = await (self._s3() if scheme == "s3" else asyncio.to_thread(self._gs))
            return self._systems[scheme]

    async def _s3(self) -> Any:
        config: dict[str, Any] = {
            "connect_timeout": self.limits.answering,
            "read_timeout": self.limits.answering,
            "retries": {"total_max_attempts": self.limits.tries},
            "signature_version": "s3v4",  # the older one is refused by buckets made since 2020
        }
        options: dict[str, Any] = {"config_kwargs": config, "cache_regions": True}  # finds the region of a bucket
        if not self.private:  # whatever the environment, its files or fsspec's say
            config |= {"ignore_configured_endpoint_urls": True, "proxies": {}}
            options |= {"endpoint_url": None, "client_kwargs": {}}
        system = await self._s3_of(options)
        if not system.anon and not system.key and await system.session.get_credentials() is None:
            system = await self._s3_of({**options, "anon": True})
        return system

    async def _s3_of(self, options: dict[str, Any]) -> Any:
        import fsspec

        await asyncio.to_thread(fsspec.get_filesystem_class, "s3")  # to import it takes seconds
        system = fsspec.filesystem("s3", asynchronous=True, skip_instance_cache=True, **options)
        await system.set_session()
        self._opened.push_async_exit(system._s3creator)  # its only way to close all its connections
        return system

    def _gs(self) -> Any:
        import fsspec

        options = {} if self.private else {"endpoint_url": GOOGLE}
        return fsspec.filesystem("gs", asynchronous=True, skip_instance_cache=True, access="read_only", **options)
