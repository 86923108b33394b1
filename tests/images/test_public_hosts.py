"""Addresses of images: which are read, how they are shown, and which machines may be connected to."""

from __future__ import annotations

import socket

import pytest

from nbfeat.errors import ImageError
from nbfeat.images import public_hosts

PUBLIC = [
    "93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8", "64:ff9b::808:808",
    "2002:808:808::1",
]  # fmt: skip
PRIVATE = [
    "0.0.0.0", "10.0.0.1",  # noqa: S104 - not bound to
    "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.1.1", "192.88.99.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::7f00:1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "2001:db8::1",
    "2001::1", "3fff::1", "5f00::1", "4000::1", "100::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a00:1::1",
]  # fmt: skip


@pytest.mark.parametrize("machine", PUBLIC)
def test_machines_of_the_internet_are_public(machine: str) -> None:
    family = socket.AF_INET6 if ":" in machine else socket.AF_INET
    with public_hosts.public_socket((family, socket.SOCK_STREAM, 0, "", (machine, 80))) as made:
        assert made.family == family


@pytest.mark.parametrize("machine", PRIVATE)
def test_machines_of_this_network_or_of_none_are_not(machine: str) -> None:
    family = socket.AF_INET6 if ":" in machine else socket.AF_INET
    with pytest.raises(public_hosts.PrivateMachineError, match=machine.partition("%")[0]):
        public_hosts.public_socket((family, socket.SOCK_STREAM, 0, "", (machine, 80)))


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no sockets of files")
def test_a_socket_of_a_file_is_no_machine() -> None:
    with pytest.raises(public_hosts.PrivateMachineError):
        public_hosts.public_socket((socket.AF_UNIX, socket.SOCK_STREAM, 0, "", ("/tmp/x", 0)))  # noqa: S108 - not opened


def test_addresses_that_are_read() -> None:
    for text in ("http://example.org/a", "HTTPS://example.org/a", "s3://bucket/a b", "gs://bucket/a", "zip://a::b.zip"):
        assert public_hosts.check(text) == text.partition(":")[0].lower()
    for text in ("a.jpg", "/a/b.jpg", "C:/a.jpg", "12:30.jpg", "photo:1.jpg", "a b://c", "", "./s3://x"):
        assert public_hosts.scheme_of(text) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://example.org/a.jpg", "ftp: URLs aren't supported"),
        ("github://o:r@main/a.jpg", "github: URLs"),
        ("github:o/r/a.jpg", "github: URLs"),
        ("hdfs://node/a.jpg", "hdfs: URLs"),
        ("memory://a.jpg", "memory: URLs"),
        ("simplecache::https://example.org/a.jpg", "chained URLs aren't supported, except zip:"),
        ("filecache::s3://bucket/a.jpg", "chained"),
        ("file::/etc/passwd", "chained"),
        ("https:/example.org/a.jpg", "starts with https://, but pathlib"),
        ("s3:bucket/a.jpg", "starts with s3://"),
    ],
)
def test_addresses_that_are_not_read(text: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        public_hosts.check(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://example.org/a.jpg", "https://example.org/a.jpg"),
        ("https://example.org:8080/icon@2x.png", "https://example.org:8080/icon@2x.png"),
        ("http://[::1]:80/icon@2x.png", "http://[::1]:80/icon@2x.png"),
        ("https://me:hunter2@example.org/a.jpg", "https://example.org/a.jpg"),
        ("https://hunter2@example.org/a.jpg", "https://example.org/a.jpg"),
        ("s3://AKIA:hunt/er2@bucket/a.jpg", "s3://bucket/a.jpg"),
        ("https://example.org/a.jpg?X-Amz-Signature=hunter2", "https://example.org/a.jpg?…"),
        ("https://example.org/a.jpg#hunter2", "https://example.org/a.jpg#…"),
        ("https://example.org/a.jpg?\nhunter2", "https://example.org/a.jpg?…"),
        ("simplecache::https://me:hunter2@example.org/a.jpg?hunter2", "simplecache::https://example.org/a.jpg?…"),
        ("zip://a.jpg::https://me:hunter2@example.org/a.zip", "zip://a.jpg::https://example.org/a.zip"),
        ("ftp://me:hunter2@example.org/a.jpg", "ftp://example.org/a.jpg"),
        ("file:///a?b#c@d.jpg", "file:///a?b#c@d.jpg"),
        ("/a?b#c@d.jpg", "/a?b#c@d.jpg"),
    ],
)
def test_neither_passwords_nor_signatures_are_shown(text: str, expected: str) -> None:
    assert public_hosts.redact_url(text) == expected


def test_the_environment_allows_private_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(public_hosts.PRIVATE, raising=False)
    assert not public_hosts.are_private_allowed()
    for value, expected in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv(public_hosts.PRIVATE, value)
        assert public_hosts.are_private_allowed() is expected
