"""Which image URLs are read, how they are displayed, and which hosts may be connected to: public ones."""

import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from nbfeat.errors import ImageError

WEB = frozenset({"http", "https"})
FETCHED = WEB | {"s3", "gs"}
ARCHIVE = "zip"
PRIVATE = "NBFEAT_REMOTE_PRIVATE"  # the environment variable that allows private hosts
NOT_ALLOWED = "image URLs are fetched only with `allow_remote=True`"

# fsspec's chains start with `name::`; without slashes, only an unlikely file name counts as a scheme.
_SCHEME = re.compile(
    r"\s*(?:(?P<chain>[a-z][a-z0-9+.-]+::)|(?P<any>[a-z][a-z0-9+.-]+)://|"
    r"(?P<known>file|https?|s3|gs|zip|ftps?|sftp|hdfs|github|gitlab|data(?=:\w+/)):)",
    re.IGNORECASE,
)
# Up to the "@", even if the password contains a slash.
_USER = re.compile(r"(?<=://)(?:[^/?#]*@|(?!\[)[^/?#:@]*:(?!:|\d*(?:[/?#]|$)).*@)", re.DOTALL)
_AFTER = re.compile(r"(?<=[?#]).+", re.DOTALL)

_GLOBAL_UNICAST, _NAT64 = ip_network("2000::/3"), ip_network("64:ff9b::/96")
# What older Pythons consider public, and the public address where Azure answers its own machines.
_NOT_PUBLIC = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20")))


class PrivateMachineError(OSError):
    """A host may not be connected to; an OSError, so that its other addresses are tried."""


def scheme_of(text: str) -> str:
    """Return the scheme of a URL in lower case; "" for other text.

    >>> scheme_of("HTTPS://example.org/a.jpg"), scheme_of("simplecache::s3://b/a.jpg"), scheme_of("C:/a.jpg")
    ('https', 'simplecache::', '')
    """
    found = _SCHEME.match(text)
    return (found["chain"] or found["any"] or found["known"]).lower() if found else ""


def check(text: str) -> str:
    """Return the scheme of a URL; raise ImageError if it isn't supported."""
    text, scheme = text.strip(), scheme_of(text)
    if scheme.endswith("::"):
        raise ImageError("chained URLs aren't supported, except zip://image::archive for a local archive")
    if scheme not in FETCHED | {ARCHIVE}:
        raise ImageError(f"{scheme}: URLs aren't supported, only http, https, s3, gs and zip: download the file first")
    if not text[len(scheme) :].startswith("://"):
        raise ImageError(f"a URL starts with {scheme}://, but pathlib has removed a slash: {redact_url(text)}")
    return scheme


def redact_url(text: str) -> str:
    """Return `text` for display: URLs without user, password and query.

    >>> redact_url("https://me:secret@example.org/a.jpg?signature=abc")
    'https://example.org/a.jpg?…'
    """
    return text if "://" not in text or scheme_of(text) == "file" else _AFTER.sub("…", _USER.sub("", text))


def are_private_allowed() -> bool:
    """Return whether the environment allows private hosts."""
    return os.environ.get(PRIVATE, "") not in {"", "0"}


def is_public(machine: IPv4Address | IPv6Address) -> bool:
    """Return whether `machine` is a public address of the internet."""
    if isinstance(machine, IPv6Address):  # it counts as the IPv4 address that it wraps: mapped, 6to4, NAT64
        within = IPv4Address(machine.packed[-4:]) if machine in _NAT64 else machine.ipv4_mapped or machine.sixtofour
        if within is not None:
            return is_public(within)
        if machine not in _GLOBAL_UNICAST:
            return False
    is_odd = machine.is_multicast or machine.is_reserved or any(machine in network for network in _NOT_PUBLIC)
    return machine.is_global and not is_odd


def public_socket(info: tuple[Any, ...]) -> socket.socket:
    """Return a socket for the address in `info`, just before it connects; raise PrivateMachineError unless public."""
    family, kind, protocol, _, address = info
    if family not in {socket.AF_INET, socket.AF_INET6} or not is_public(ip_address(address[0])):
        raise PrivateMachineError(str(address[0]))
    return socket.socket(family, kind, protocol)
