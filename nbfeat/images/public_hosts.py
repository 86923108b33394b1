"""Which addresses of images are read, how they are shown, and which machines may be connected to: public ones."""

from __future__ import annotations

import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from nbfeat.errors import ImageError

WEB = frozenset({"http", "https"})
FETCHED = WEB | {"s3", "gs"}
ARCHIVE = "zip"
PRIVATE = "NBFEAT_REMOTE_PRIVATE"  # the environment variable that allows private machines
NOT_ALLOWED = "images by address are read only with --allow-remote (allow_remote=True)"

# A chain of fsspec's begins with `name::`; without slashes only what is no likely name of a file is taken for a scheme.
_SCHEME = re.compile(
    r"\s*(?:(?P<chain>[a-z][a-z0-9+.-]+::)|(?P<any>[a-z][a-z0-9+.-]+)://|"
    r"(?P<known>file|https?|s3|gs|zip|ftps?|sftp|hdfs|github|gitlab|data(?=:\w+/)):)",
    re.IGNORECASE,
)
# Up to the "@"; of a password with a slash in it, too.
_USER = re.compile(r"(?<=://)(?:[^/?#]*@|(?!\[)[^/?#:@]*:(?!:|\d*(?:[/?#]|$)).*@)", re.DOTALL)
_AFTER = re.compile(r"(?<=[?#]).+", re.DOTALL)

_GLOBAL_UNICAST, _NAT64 = ip_network("2000::/3"), ip_network("64:ff9b::/96")
# What older Pythons take for public, and the one public address at which Azure answers its own machines.
_NOT_PUBLIC = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20")))


class PrivateMachineError(OSError):
    """A machine may not be connected to; an OSError, so that a host's other addresses are tried."""


def scheme_of(text: str) -> str:
    """Return what `text` begins with where that makes it an address, in small letters, else "".

    >>> scheme_of("HTTPS://example.org/a.jpg"), scheme_of("simplecache::s3://b/a.jpg"), scheme_of("C:/a.jpg")
    ('https', 'simplecache::', '')
    """
    found = _SCHEME.match(text)
    return (found["chain"] or found["any"] or found["known"]).lower() if found else ""


def check(text: str) -> str:
    """Return the scheme of an address that is read; raise ImageError for any other."""
    text, scheme = text.strip(), scheme_of(text)
    if scheme.endswith("::"):
        raise ImageError("chained addresses are not read, except zip://image::archive of a local archive")
    if scheme not in FETCHED | {ARCHIVE}:
        raise ImageError(f"{scheme}: addresses are not read, only http, https, s3, gs and zip: download the file first")
    if not text[len(scheme) :].startswith("://"):
        raise ImageError(
            f"an address begins with {scheme}://, but this one does not; pathlib takes a slash away: {redact_url(text)}"
        )
    return scheme


def redact_url(text: str) -> str:
    """Return `text` as it may be shown: of addresses, neither user and password nor what follows a "?".

    >>> redact_url("https://me:secret@example.org/a.jpg?signature=abc")
    'https://example.org/a.jpg?…'
    """
    if "://" not in text or scheme_of(text) == "file":
        return text
    return _AFTER.sub("…", _USER.sub("", text))


def are_private_allowed() -> bool:
    """Tell whether the environment allows to connect to private machines."""
    return os.environ.get(PRIVATE, "") not in {"", "0"}


def is_public(machine: IPv4Address | IPv6Address) -> bool:
    """Tell whether `machine` is one of the internet, and not of this network or none at all."""
    if isinstance(machine, IPv6Address):  # which is what it wraps, where it wraps one of IPv4: mapped, 6to4, NAT64
        within = IPv4Address(machine.packed[-4:]) if machine in _NAT64 else machine.ipv4_mapped or machine.sixtofour
        if within is not None:
            return is_public(within)
        if machine not in _GLOBAL_UNICAST:
            return False
    is_odd = machine.is_multicast or machine.is_reserved or any(machine in network for network in _NOT_PUBLIC)
    return machine.is_global and not is_odd


def public_socket(info: tuple[Any, ...]) -> socket.socket:
    """Return the socket to connect to the very address in `info`; raise PrivateMachineError where it is not public.

    It is made right before it is connected, whichever way the address was found, so that nothing can come between.
    """
    family, kind, protocol, _, address = info
    if family not in {socket.AF_INET, socket.AF_INET6} or not is_public(ip_address(address[0])):
        raise PrivateMachineError(str(address[0]))
    return socket.socket(family, kind, protocol)
