"""Images by address: what is fetched, what is not, and what becomes of it."""

from __future__ import annotations

import datetime as dt
import gzip
import io
import re
import signal
import socket
import ssl
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import nbfeat
from nbfeat import Extraction, ExtractionError
from nbfeat.errors import ImageError
from nbfeat.extraction import pipeline
from nbfeat.images import public_hosts, remote
from nbfeat.images.remote import Limits
from nbfeat.images.sources import hosts, image_column, load, load_image
from tests.faces import Face, every_face
from tests.fake import FakeEngine
from tests.web import Request, Web, in_turn, redirect, status, whole

pytest.importorskip("aiohttp", reason="no aiohttp here: pip install '.[remote]'")

BLOCK = "MobileNet --size 32"
HERE = Path()
fake = pytest.mark.usefixtures("fake_network")


@pytest.fixture
def web() -> Iterator[Web]:
    """Serve at 127.0.0.1."""
    with Web() as server:
        yield server


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow private machines, such as this one."""
    monkeypatch.setenv(public_hosts.PRIVATE, "1")


allowed = pytest.mark.usefixtures("private")


@pytest.fixture
def this_machine_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 127.0.0.1 for a machine of the internet; all others are what they are."""
    real = public_hosts.is_public
    monkeypatch.setattr(public_hosts, "is_public", lambda machine: str(machine) == "127.0.0.1" or real(machine))


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Take limits that tests can wait for."""
    short = Limits(size=200_000, answering=30, seconds=100, pause=0.01, longest_pause=1)
    monkeypatch.setattr(remote, "LIMITS", short)
    return short


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Fail where a thread of ours outlives a test."""
    yield
    deadline = time.monotonic() + 10
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("nbfeat-")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def picture(shade: int = 128) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def fetched(address: str, limits: Limits | None = None) -> bytes:
    with remote.Fetcher(HERE, remote.Access.here(limits)) as fetch:
        return fetch(address)


def reason(address: str, limits: Limits | None = None) -> str:
    with pytest.raises(ImageError) as error:
        fetched(address, limits)
    return str(error.value)


def frame_of(*cells: object) -> pd.DataFrame:
    return pd.DataFrame({"path": cells})


# Through the faces


@allowed
@fake
@every_face
def test_every_face_fetches_images_where_it_is_allowed(
    extract: Face, web: Web, photos: pd.DataFrame, archive: Path
) -> None:
    local = [Path(path).read_bytes() for path in photos["path"][:2]] + [picture(), picture(2)]
    cells = [web.put(f"/{place}.png", data) for place, data in enumerate(local[:2])]
    frame = frame_of(*cells, f"zip://inner/a.png::{archive}", "zip://b?#.png::many.zip", photos["path"].iloc[3])
    result = extract(frame, BLOCK, images="path", root=str(archive.parent))
    assert [("allow_remote=True" in reason) for reason in result.failures["reason"]] == [True] * 4
    assert web.asked == []
    result = extract(frame, BLOCK, images="path", allow_remote=True, root=str(archive.parent))
    assert result.failures.empty
    assert sorted(web.asked) == sorted(web.answers)
    same = nbfeat.extract(frame_of(*local, photos["path"].iloc[3]), BLOCK, images="path", cache=False)
    np.testing.assert_array_equal(result.features.to_numpy(), same.features.to_numpy())


@fake
def test_where_all_are_addresses_the_error_says_what_to_do() -> None:
    frame = frame_of("https://example.org/a.png", "s3://bucket/b.png")
    with pytest.raises(ExtractionError, match=r"allow_remote=True`.*Pass .*allow.remote.* if you trust these URLs\.$"):
        nbfeat.extract(frame, BLOCK, images="path")


@allowed
@fake
def test_the_transformer_fetches_where_it_is_allowed(web: Web) -> None:
    images = [web.put("/a.png", picture(1)), web.put("/b.png", picture(2))]
    rows = nbfeat.ImageFeatures(BLOCK, allow_remote=True).fit_transform(images)
    assert np.isfinite(rows).all()
    assert np.isnan(nbfeat.ImageFeatures(BLOCK).fit([picture(3)]).transform(images)).all()


@allowed
@fake
def test_images_are_read_again_each_run_and_known_by_their_content(web: Web, photos: pd.DataFrame) -> None:
    cells = [web.put(f"/{n}.png", picture(n)) for n in range(5)]
    frame = frame_of(*cells, web.url("/lost.png"), *photos["path"])

    def run() -> Any:
        extraction = Extraction(frame, BLOCK, images="path", allow_remote=True)
        notes = [step.note for step in extraction.steps()]
        assert any(note.endswith("fetching images from 1 host") for note in notes)
        assert extraction.failures["reason"].tolist() == [f"not found (404): {web.url('/lost.png')}"]
        assert extraction.features.notna().all(axis=1).sum() == len(frame) - 1
        return extraction.cached, FakeEngine.computed

    assert run() == (0, 25)
    assert run() == (25, 25)
    assert len(web.asked) == 12
    web.put("/0.png", picture(77))
    assert run() == (24, 26)


@fake
def test_no_host_is_named_where_nothing_is_fetched(photos: pd.DataFrame) -> None:
    steps = Extraction(photos, BLOCK, images="path", allow_remote=True).steps()
    assert not any("fetched" in step.note for step in steps)
    cells = ["https:/x/a.jpg", "https:x", "http://", "/a.jpg", b"", None, "zip://a::b.zip", "simplecache::s3://x/a"]
    assert hosts(cells) == set()
    assert hosts(["https://me:hunter2@A.org/a", {"path": "https://a.org/b"}, "s3://b/c"]) == {"a.org", "b"}


@allowed
@fake
def test_precisions_are_compared_and_speed_is_measured_on_what_was_fetched(web: Web) -> None:
    frame = frame_of(*(web.put(f"/{n}.png", picture(n)) for n in range(5)))
    result = nbfeat.extract(frame, BLOCK, images="path", precision="bfloat16", allow_remote=True)
    assert "similarity to float32 is at least 1.0000 on 5 of your images" in repr(result)
    web.asked.clear()
    assert result.speed_of(result.parts[0]) > 0
    assert len(web.asked) == 5  # once each, however often it is run


@allowed
@fake
def test_a_run_that_is_stopped_waits_for_no_server(web: Web) -> None:
    right = [web.put(f"/{n}.png", picture(n)) for n in range(4)]
    frame = frame_of(*right, *(web.put(f"/{n}.png", Request.hold) for n in range(4, 40)))
    extraction = Extraction(frame, BLOCK, images="path", allow_remote=True, batch_size=1)
    main = threading.get_ident()

    def interrupt() -> None:
        while web.busy < 5:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    def work() -> None:
        with closing(extraction.steps()) as steps:
            assert any(step.done for step in steps)
            threading.Thread(target=interrupt).start()
            list(steps)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert web.busy  # these never answered, and the run is over
    assert extraction.state == "stopped"


@allowed
@fake
def test_waiting_holds_no_decoder(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 1)
    both = threading.Barrier(8, timeout=20)

    def answer(request: Request) -> None:
        both.wait()  # for seven others
        request.reply(picture(len(request.path)))

    frame = frame_of(*(web.put(f"/{'a' * n}.png", answer) for n in range(8)))
    assert nbfeat.extract(frame, BLOCK, images="path", allow_remote=True).failures.empty


@allowed
def test_no_more_are_asked_for_at_once_than_the_limit(web: Web) -> None:
    def answer(request: Request) -> None:
        time.sleep(0.02)
        request.reply(picture())

    urls = [web.put(f"/{n}.png", answer) for n in range(12)]
    with remote.Fetcher(HERE, remote.Access.here(Limits(at_once=3))) as fetch, ThreadPoolExecutor(12) as pool:
        assert list(pool.map(fetch, urls)) == [picture()] * 12
    assert len(web.asked) == 12
    assert web.busiest <= 3


@allowed
@fake
def test_passwords_and_signatures_are_shown_nowhere(
    extract: Face, web: Web, photos: pd.DataFrame, own_cache: Path
) -> None:
    web.put("/lost.png?sig=hunter2", status(404))
    bad = web.url("/lost.png?sig=hunter2").replace("http://", "http://me:hunter2@")
    frame = photos.assign(path=[f" {bad}\n", f"simplecache::{bad}", f"folder/{bad}", *photos["path"][3:]])
    result = extract(frame, BLOCK, images="path", allow_remote=True)
    assert len(result.failures) == 3
    shown = [repr(result), result._repr_html_(), result.failures.to_string(), str(dict(result.recipe))]
    assert not any("hunter2" in text for text in shown)
    assert web.headers[0]["Authorization"].startswith("Basic ")  # it was used, though
    with pytest.raises(ExtractionError) as error:
        extract(frame[:3], BLOCK, images="path", allow_remote=True)
    assert "hunter2" not in str(error.value)
    kept = [file for file in own_cache.rglob("*") if file.is_file()]
    assert kept
    assert not any(b"hunter2" in file.read_bytes() for file in kept)


def test_a_column_that_is_asked_for_in_vain_shows_no_signature() -> None:
    frame = pd.DataFrame({"path": ["https://me:hunter2@example.org/page?sig=hunter2"], "n": [1]})
    for asked in (None, "pth"):
        with pytest.raises(nbfeat.RequestError) as error:
            image_column(frame, asked)
        assert "hunter2" not in str(error.value)


# What a server answers


def in_chunks(request: Request) -> None:
    request.begin(Transfer_Encoding="chunked")
    data = picture()
    for part in (data[:7], data[7:100], data[100:]):
        request.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    request.wfile.write(b"0\r\n\r\n")


def cut_off(request: Request) -> None:
    request.begin(Content_Length="1000")
    request.wfile.write(b"x" * 100)
    request.close_connection = True


@allowed
@pytest.mark.parametrize(
    ("tries", "answer"),
    [
        (1, whole(picture())),
        (1, whole(picture(), Content_Type="text/html; charset=utf-8")),
        (1, whole(picture(), Content_Encoding="identity")),
        (1, in_chunks),
        (3, in_turn(status(500), status(503), whole(picture()))),
        (2, in_turn(status(429, Retry_After="0"), whole(picture()))),
        (2, in_turn(status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), whole(picture()))),
        (3, in_turn(cut_off, cut_off, whole(picture()))),
    ],
)
def test_images_that_come(tries: int, answer: Any, web: Web) -> None:
    assert fetched(web.put("/a.png", answer)) == picture()
    assert len(web.asked) == tries


def endless(request: Request) -> None:
    request.begin()
    for _ in range(1000):
        request.wfile.write(b"x" * 100_000)
    request.server.answers["/end"] = status(200)  # nobody stopped it


def endless_headers(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        request.wfile.write(b"X-Header-%d: %s\r\n" % (number, b"x" * 1000))
    request.server.answers["/end"] = status(200)  # nobody stopped it


def enormous(request: Request) -> None:
    request.begin(Content_Length="10000000000")
    request.hold()


@allowed
@pytest.mark.parametrize(
    ("answer", "words", "tries"),
    [
        *((status(code), f"not found ({code})", 1) for code in (404, 410)),
        *((status(code), f"permission denied ({code})", 1) for code in (401, 403)),
        (status(418), "the server answers 418", 1),
        (status(204), "the server answers 204 (no content)", 1),
        (status(302), "the server answers 302 (found)", 1),
        (status(500), "the server answers 500 (internal server error)", 3),
        (status(599), "the server answers 599", 3),
        (status(429, Retry_After="0"), "the server answers 429 (too many requests)", 3),
        (status(429, Retry_After="3600"), "429 (too many requests); retry after 3,600 s", 1),
        (whole(b""), "the answer is empty", 1),
        (cut_off, "the connection was lost", 3),
        (endless, "larger than 0.2 MB, the limit for an image", 1),
        (enormous, "larger than 0.2 MB", 1),
        (whole(b"x" * 300_000), "larger than 0.2 MB", 1),
        (whole(gzip.compress(b"x" * 10_000_000), Content_Encoding="gzip"), "the answer is compressed", 1),
        (whole(b"x", Content_Encoding="br"), "the answer is compressed", 1),
        (lambda request: request.wfile.write(b"220 ftp here\r\n"), "the server's answer isn't HTTP", 1),
        (endless_headers, "the server's answer isn't HTTP", 1),
        *((redirect(f"{to}://a/b"), f"redirected to {to}:, which isn't allowed", 1) for to in ("ftp", "file", "s3")),
        (redirect("http://[::1/"), "not a valid URL", 1),
        (redirect("/a.png"), "redirected more than 5 times", 6),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_do_not_come(answer: Any, words: str, tries: int, web: Web) -> None:
    url = web.put("/a.png", answer)
    said = reason(url)
    assert words in said
    assert said.endswith(f": {url}")
    assert len(web.asked) == tries
    assert "/end" not in web.answers


@allowed
def test_a_server_that_is_slow(web: Web) -> None:
    def answer(request: Request) -> None:  # a byte at a time
        request.begin(Content_Length="100000")
        while not request.server.closing.wait(0.02):
            request.wfile.write(b"x")

    said = reason(web.put("/a.png", Request.hold), Limits(answering=0.05, pause=0.01))
    assert said.startswith("no answer within 0.05 s: ")
    assert 0 < len(web.asked) <= 3
    assert reason(web.put("/b.png", answer), Limits(seconds=0.2)).startswith("not fetched within 0.2 s: ")


@allowed
def test_hosts_that_cannot_be_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = reason(f"http://127.0.0.1:{free.getsockname()[1]}/a.png", Limits(pause=0.01))
    assert said.startswith("the connection failed (connection refused): ")
    waited, error = threading.Event(), socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def lookup(*_: object, **__: object) -> None:
        waited.wait(20)
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    said = reason("http://slow.invalid/a.png", Limits(answering=0.05, pause=0.01))
    assert said == "no answer within 0.05 s: http://slow.invalid/a.png"
    waited.set()  # which ends the threads that look it up
    assert reason("http://slow.invalid/a.png").startswith("the host lookup failed: ")
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert reason("https://nowhere.invalid/a.png") == "no such host: https://nowhere.invalid/a.png"


@allowed
@pytest.mark.parametrize(
    "address",
    ["http://", "https:///a.png", "http://exa mple:99999/a.png", "http://[::1/a.png",
     "http://2130706433/a.png", "http://0/a.png", "http://127.1/a.png"],  # numbers that some take for machines
)  # fmt: skip
def test_addresses_that_cannot_be_asked_for(address: str) -> None:
    assert reason(address).startswith("not a valid URL: ")


@allowed
def test_redirects_are_followed_and_what_is_quoted_stays_as_it_is(web: Web) -> None:
    chain = [redirect("/1", 302), redirect("/2", 301), redirect(web.url("/3"), 303), redirect("4", 307)]
    for place, answer in enumerate([*chain, redirect("/a b.png", 308)]):
        web.put(f"/{place}", answer)
    web.put("/a%20b.png", picture())
    assert fetched(web.url("/0")) == fetched(web.url("/a b.png")) == picture()
    web.asked.clear()
    quoted = "/a%2Fb/c%20d.png?X-Amz-Credential=AKIA%2F2026&s=%2B%2f"
    web.put("/moved", redirect(quoted))
    for url in (web.put(quoted, picture()), web.url("/moved")):
        assert fetched(url) == picture()
    assert web.asked == [quoted, "/moved", quoted]
    web.put("/%C3%A9%20.png", picture(2))
    assert fetched(web.url("/é .png")) == picture(2)


def test_redirects_from_https_to_http_are_not_followed() -> None:
    import yarl

    here = yarl.URL("https://example.org/a")
    assert str(remote._redirected(here, "//other.org/b")) == "https://other.org/b"
    with pytest.raises(ImageError, match="redirected from https to http, which isn't allowed"):
        remote._redirected(here, "http://example.org/b")


def sent_to_another(web: Web, path: str, address: str) -> list[bool]:
    """Redirect from `path` within the server, then to another; tell which requests for `address` were authorized."""
    with Web() as other:
        web.put(path, redirect("/b"))
        web.put("/b", redirect(other.put("/c.png", picture())))
        assert fetched(address) == picture()
        return ["Authorization" in headers for headers in web.headers + other.headers]


@allowed
def test_a_password_goes_to_no_other_server(web: Web) -> None:
    assert sent_to_another(web, "/a", web.url("/a").replace("http://", "http://me:hunter2@")) == [True, True, False]


# Private machines


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]"])
def test_private_machines_are_not_connected_to(host: str, web: Web) -> None:
    said = reason(f"http://{host}:{web.server_port}/a.png")
    assert "is a private address: set NBFEAT_REMOTE_PRIVATE=1 to allow it: http://" in said
    assert web.asked == []


public = pytest.mark.usefixtures("this_machine_is_public")


def found_at(monkeypatch: pytest.MonkeyPatch, *machines: str, **machines_then: str) -> list[str]:
    """Let every host be found at `machines`, from the second look-up on `then` alone; return which were looked up."""
    looked_up: list[str] = []

    def lookup(host: Any, port: Any, *_: object, **__: object) -> list[Any]:  # as the system's
        looked_up.append(host)
        found = machines if len(looked_up) == 1 else tuple(machines_then.values()) or machines
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (machine, int(port))) for machine in found]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return looked_up


@public
def test_a_redirect_to_a_private_machine_is_not_followed(web: Web) -> None:
    with Web("127.0.0.2") as inner:
        url = web.put("/a.png", redirect(inner.put("/secret.png", picture())))
        assert reason(url).startswith("127.0.0.2 is a private address")
        assert web.asked == ["/a.png"]
        assert inner.asked == []


@public
def test_a_name_that_is_looked_up_again_cannot_lead_elsewhere(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with Web("127.0.0.2", web.server_port) as inner:
        looked_up = found_at(monkeypatch, "127.0.0.1", then="127.0.0.2")
        web.put("/a.png", picture(1))
        inner.put("/a.png", picture(2))
        url = f"http://rebinding.example:{web.server_port}/a.png"
        assert fetched(url) == picture(1)
        assert len(looked_up) == 1
        assert reason(url).startswith("127.0.0.2 is a private address")
        assert inner.asked == []


@public
def test_of_a_name_with_several_machines_only_public_ones_are_asked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with Web("127.0.0.2", web.server_port) as inner:
        web.put("/a.png", picture())
        url = f"http://several.example:{web.server_port}/a.png"
        found_at(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1")
        assert fetched(url) == picture()
        found_at(monkeypatch, "127.0.0.2", "127.0.0.3")
        assert "is a private address" in reason(url)
        assert inner.asked == []


@public
def test_a_proxy_of_the_environment_is_not_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with Web("127.0.0.2") as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        assert fetched(web.put("/a.png", picture())) == picture()
        assert reason("http://10.0.0.1/a.png").startswith("10.0.0.1 is a private address")
        assert proxy.asked == []


@allowed
def test_a_server_whose_certificate_nobody_vouches_for(web: Web, tmp_path: Path) -> None:
    web.socket = certified(tmp_path).wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
    url = web.put("/a.png", picture()).replace("http://", "https://")
    assert reason(url) == f"the server's certificate isn't valid: {url}"
    assert web.asked == []


def certified(folder: Path) -> ssl.SSLContext:
    """Return what a server shows that vouches for itself."""
    x509 = pytest.importorskip("cryptography.x509", reason="no cryptography here: pip install '.[test]'")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(made.public_bytes(pem) + key.private_bytes(pem, *plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


# Archives


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("inner/a.png", picture())
        out.writestr("b?#.png", picture(2), zipfile.ZIP_DEFLATED)
        out.writestr("empty.png", b"")
        out.writestr("bomb.png", bytes(10_000_000), zipfile.ZIP_DEFLATED)
        out.writestr("packed.png", bytes(1000), zipfile.ZIP_LZMA)
        out.writestr("folder/", b"")
    return path


def test_a_member_of_an_archive(archive: Path) -> None:
    assert fetched(f"zip://inner/a.png::{archive}") == picture()
    with remote.Fetcher(archive.parent) as fetch:
        assert fetch("zip://inner/a.png::many.zip") == picture()
        assert fetch("zip://b?#.png::./many.zip") == picture(2)
        assert load("ZIP://inner/a.png::many.zip", HERE, fetch) == (picture(), None)


def test_members_that_are_not_read(archive: Path) -> None:
    expected = {
        "zip://c.png::{}": "no such member of the archive: c.png in ",
        "zip://a.png::{}x": "no such archive: ",
        "zip://folder/::{}": "a folder, not a file: folder/",
        "zip://empty.png::{}": "the file is empty: empty.png",
        "zip://bomb.png::{}": "too large for an image (10,000,000 bytes): bomb.png",
        "zip://packed.png::{}": "compressed by a method other than deflate",
        "zip://a.png::/dev/zero": "a folder, pipe or device, not an archive: /dev/zero",
        "zip://a.png::/": "a folder, pipe or device, not an archive: /",
        "zip://a.png::\0": "the path contains a character that file names can't have: ",
    }
    elsewhere = (
        "zip://a.png", "zip://::{}", "zip://a.png::", "zip://a.png::zip://b.zip::{}", "zip://a.png::file://{}",
        "zip://a.png::https://example.org/b.zip", "zip://a.png::simplecache::s3://b/c.zip",
    )  # fmt: skip
    expected |= dict.fromkeys(elsewhere, "zip URLs need an archive on this machine")
    with remote.Fetcher(HERE) as fetch:
        for address, words in expected.items():
            with pytest.raises(ImageError, match=f"^{re.escape(words)}"):
                fetch(address.format(archive))


def test_archives_that_are_damaged(archive: Path, tmp_path: Path) -> None:
    data, broken = archive.read_bytes(), tmp_path / "broken.zip"
    at = data.index(picture())
    longer = data.replace((10_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))  # than it says
    for member, damaged in (
        ("inner/a.png", data[: len(data) // 2]),
        ("inner/a.png", data[: at + 50] + b"\xff" * 9 + data[at + 59 :]),
        ("bomb.png", longer),
    ):
        broken.write_bytes(damaged)
        assert reason(f"zip://{member}::{broken}").startswith("the archive is damaged or isn't a zip file: ")


def test_more_archives_than_stay_open(tmp_path: Path) -> None:
    urls = []
    for number in range(20):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as out:
            out.writestr("a.png", picture(number))
        urls.append(f"zip://a.png::{number}.zip")
    with remote.Fetcher(tmp_path) as fetch, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, urls * 20)) == [picture(number) for number in range(20)] * 20
        assert fetch._archive_at.cache_info().currsize == 8
    with pytest.raises(ImageError, match=r"the run stopped before it was fetched: zip://a\.png"):
        fetch(urls[0])


# Buckets


@pytest.fixture(scope="module")
def amazon() -> Iterator[str]:
    """Serve S3 at 127.0.0.1, with a bucket of one image."""
    server = pytest.importorskip("moto.server", reason="no moto here: pip install '.[test]'")
    thread = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    thread.start()
    host, port = thread.get_host_and_port()
    yield f"http://{host}:{port}"
    thread.stop()


@pytest.fixture
def bucket(amazon: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket with an image, and let the environment have credentials and this endpoint."""
    import urllib.request

    pytest.importorskip("s3fs", reason="no s3fs here: pip install '.[remote]'")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAHUNTER2", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": amazon, "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for path, data in (("/photos", b""), ("/photos/a%20b.png", picture())):
        request = urllib.request.Request(amazon + path, data, method="PUT")  # our own
        request.add_header("Content-Type", "image/png")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request).close()
    return "s3://photos"


@allowed
@fake
def test_images_in_a_bucket_of_amazon(bucket: str) -> None:
    with remote.Fetcher(HERE) as fetch:
        assert fetch(f"{bucket}/a b.png") == picture()
        for words in (
            "not found (404): s3://photos/lost.png",
            "not found (404): s3://lost-bucket/a.png",
            "the URL of a bucket, not of an image in it: s3://photos",
            "s3: the URL can't be signed (ParamValidationError): s3://!!/a.png",
        ):
            with pytest.raises(ImageError) as error:
                fetch(words[words.index("s3://") :])
            assert str(error.value) == words
    frame = frame_of(f"{bucket}/a b.png", f"{bucket}/lost.png")
    result = nbfeat.extract(frame, BLOCK, images="path", allow_remote=True)
    assert result.failures["reason"].tolist() == [f"not found (404): {bucket}/lost.png"]
    assert "hunter2" not in repr(result).lower()


def test_the_endpoint_of_the_environment_counts_only_where_private_machines_are_allowed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []

    def lookup(host: str, *_: Any, **__: Any) -> Any:
        looked_up.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    said = reason(f"{bucket}/a b.png", Limits(tries=1))
    assert said.startswith("s3: the URL can't be signed (EndpointConnectionError): ")
    assert looked_up
    assert all(host.endswith(".amazonaws.com") for host in looked_up)


@allowed
def test_without_credentials_a_bucket_is_asked_as_anybody_may(
    bucket: str, amazon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = seen(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fetched(f"{bucket}/a b.png")
    assert asked == [(f"{amazon}/photos/a%20b.png", {})]


def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, str]]]:
    """Take down what is asked for, and answer it."""
    asked: list[tuple[str, Mapping[str, str]]] = []

    async def get(_: object, address: str, headers: Mapping[str, str]) -> bytes:
        asked.append((address, headers))
        return b"x"

    monkeypatch.setattr(remote.Fetcher, "_get", get)
    return asked


@pytest.fixture
def google(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """Serve Google Cloud Storage at 127.0.0.1, and let the environment have no credentials."""
    pytest.importorskip("gcsfs", reason="no gcsfs here: pip install '.[remote]'")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", web.url(""))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    return web


@allowed
def test_an_image_in_a_bucket_of_google(google: Web) -> None:
    path = "/download/storage/v1/b/photos/o/folder%2Fa%20b%3F.png?alt=media"
    google.put(path, picture())
    assert fetched("gs://photos/folder/a b?.png") == picture()
    assert reason("gs://photos/lost.png?x=hunter2") == "not found (404): gs://photos/lost.png?…"
    assert reason("gs://photos") == "the URL of a bucket, not of an image in it: gs://photos"


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, google: Web) -> Web:
    """Let there be credentials for Google."""
    from gcsfs.credentials import GoogleCredentials

    monkeypatch.setattr(GoogleCredentials, "apply", lambda _, out: out.update(Authorization="Bearer hunter2"))
    return google


@pytest.mark.usefixtures("token")
def test_an_emulator_of_google_is_asked_only_where_private_machines_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = seen(monkeypatch)
    fetched("gs://photos/a.png")
    url = "https://storage.googleapis.com/download/storage/v1/b/photos/o/a.png?alt=media"
    assert asked == [(url, {"Authorization": "Bearer hunter2"})]


@allowed
def test_headers_of_a_bucket_go_to_no_other_server(token: Web) -> None:
    path = "/download/storage/v1/b/photos/o/a.png?alt=media"
    assert sent_to_another(token, path, "gs://photos/a.png") == [True, True, False]


# Without what it takes


@pytest.mark.parametrize(
    ("module", "address"),
    [("aiohttp", "https://example.org/a.png"), ("s3fs", "s3://bucket/a.png"), ("gcsfs", "gs://bucket/a.png")],
)
def test_without_the_extra_the_sentence_says_how_to_get_it(
    module: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert reason(address) == (
        f"{address[: address.index(':')]}: URLs need {module}, which isn't installed: pip install {module}"
    )


def test_nothing_of_the_extra_is_imported_for_files(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("aiohttp", "fsspec", "s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with remote.Fetcher(HERE) as fetch:
        assert load_image(photos["path"].iloc[0], HERE, fetch)[0] == Path(photos["path"].iloc[0]).read_bytes()


def test_a_fetcher_that_is_closed_fetches_nothing() -> None:
    fetch = remote.Fetcher(HERE)
    fetch.close()
    with pytest.raises(ImageError, match=r"the run stopped before it was fetched: https://example\.org/a\.png\?…$"):
        fetch("https://example.org/a.png?sig=hunter2")
    fetch.close()
