"""Images by address: what is fetched, what is not, and what becomes of it."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import io
import signal
import socket
import ssl
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
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
from nbfeat.images import download, public_hosts, remote
from nbfeat.images.decode import load_image
from nbfeat.images.download import Limits
from nbfeat.images.sources import hosts, image_column, load
from tests.faces import Face, every_face
from tests.fake import FakeEngine
from tests.web import Request, Web, in_turn, redirect, status, whole

pytest.importorskip("aiohttp", reason="no aiohttp here: pip install '.[remote]'")

BLOCK = "MobileNet --size 32"
HERE = Path()


@pytest.fixture
def web() -> Iterator[Web]:
    """Serve at 127.0.0.1."""
    with Web() as server:
        yield server


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow private machines, such as this one."""
    monkeypatch.setenv(public_hosts.PRIVATE, "1")


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


def picture(shade: int = 128, side: int = 40) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def fetched(address: str, limits: Limits | None = None) -> bytes:
    with remote.Fetcher(HERE, remote.Access.here(limits)) as fetch:
        return fetch(address)


def reason(address: str, limits: Limits | None = None) -> str:
    with pytest.raises(ImageError) as error:
        fetched(address, limits)
    return str(error.value)


# Through the faces


@pytest.mark.usefixtures("private", "fake_network")
@every_face
def test_every_face_fetches_images(extract: Face, web: Web, photos: pd.DataFrame) -> None:
    frame = photos.assign(path=[web.put(f"/{Path(path).name}", Path(path).read_bytes()) for path in photos["path"]])
    result = extract(frame, BLOCK, images="path", allow_remote=True)
    local = nbfeat.extract(photos, BLOCK, images="path", cache=False)
    np.testing.assert_array_equal(result.features.to_numpy(), local.features.to_numpy())
    assert result.failures.empty
    assert sorted(web.asked) == sorted(web.answers)


@pytest.mark.usefixtures("private", "fake_network")
def test_nothing_is_fetched_unless_it_is_allowed(extract: Face, web: Web, photos: pd.DataFrame) -> None:
    frame = photos.assign(path=[web.put("/a.png", picture()), *photos["path"][1:]])
    result = extract(frame, BLOCK, images="path")
    assert "--allow-remote" in result.failures["reason"].iloc[0]
    assert web.asked == []


@pytest.mark.usefixtures("fake_network")
def test_where_all_are_addresses_the_error_says_what_to_do() -> None:
    frame = pd.DataFrame({"path": ["https://example.org/a.png", "s3://bucket/b.png"]})
    with pytest.raises(ExtractionError, match=r"--allow-remote .*Say so where they are addresses that you trust\.$"):
        nbfeat.extract(frame, BLOCK, images="path")


@pytest.mark.usefixtures("private", "fake_network")
def test_the_transformer_fetches_where_it_is_allowed(web: Web) -> None:
    images = [web.put("/a.png", picture(1)), web.put("/b.png", picture(2))]
    rows = nbfeat.ImageFeatures(BLOCK, allow_remote=True).fit_transform(images)
    assert np.isfinite(rows).all()
    assert np.isnan(nbfeat.ImageFeatures(BLOCK).fit([picture(3)]).transform(images)).all()


@pytest.mark.usefixtures("private", "fake_network")
def test_one_that_fails_is_a_row_of_nan_with_a_sentence(web: Web, photos: pd.DataFrame) -> None:
    lost = web.url("/lost.png")
    frame = pd.DataFrame({"path": [web.put("/a.png", picture()), lost, *photos["path"]]})
    result = nbfeat.extract(frame, BLOCK, images="path", allow_remote=True)
    assert result.failures["reason"].tolist() == [f"not found (404): {lost}"]
    assert result.features.notna().all(axis=1).sum() == len(frame) - 1


@pytest.mark.usefixtures("private", "fake_network")
def test_images_are_read_again_each_run_and_known_by_their_content(web: Web) -> None:
    frame = pd.DataFrame({"path": [web.put(f"/{n}.png", picture(n)) for n in range(5)]})
    nbfeat.extract(frame, BLOCK, images="path", allow_remote=True)
    computed = FakeEngine.computed
    again = nbfeat.extract(frame, BLOCK, images="path", allow_remote=True)
    assert again.cached == 5
    assert FakeEngine.computed == computed
    assert len(web.asked) == 10
    web.put("/0.png", picture(77))
    assert nbfeat.extract(frame, BLOCK, images="path", allow_remote=True).cached == 4


def test_what_is_no_address_names_no_host() -> None:
    cells = ["https:/x/a.jpg", "https:x", "http://", "/a.jpg", b"", None, "zip://a::b.zip", "simplecache::s3://x/a"]
    assert hosts(cells) == set()
    assert hosts(["https://me:hunter2@A.org/a", {"path": "https://a.org/b"}, "s3://b/c"]) == {"a.org", "b"}


@pytest.mark.usefixtures("private", "fake_network")
def test_what_is_coming_says_from_how_many_hosts(web: Web, photos: pd.DataFrame) -> None:
    frame = pd.DataFrame({"path": [web.put("/a.png", picture()), *photos["path"]]})
    notes = [step.note for step in Extraction(frame, BLOCK, images="path", allow_remote=True).steps()]
    assert any(note.endswith("images are fetched from 1 host") for note in notes)
    notes = [step.note for step in Extraction(photos, BLOCK, images="path", allow_remote=True).steps()]
    assert not any("fetched" in note for note in notes)


@pytest.mark.usefixtures("private", "fake_network")
def test_precisions_are_compared_and_speed_is_measured_on_what_was_fetched(web: Web) -> None:
    frame = pd.DataFrame({"path": [web.put(f"/{n}.png", picture(n)) for n in range(5)]})
    result = nbfeat.extract(frame, BLOCK, images="path", precision="bfloat16", allow_remote=True)
    assert "agrees with float32 to 1.0000 on 5 of your images" in repr(result)
    web.asked.clear()
    assert result.speed_of(result.parts[0]) > 0
    assert len(web.asked) == 5  # once each, however often it is run


@pytest.mark.usefixtures("private", "fake_network")
def test_a_run_that_is_stopped_waits_for_no_server(web: Web) -> None:
    right = [web.put(f"/{n}.png", picture(n)) for n in range(4)]
    frame = pd.DataFrame({"path": [*right, *(web.put(f"/{n}.png", Request.hold) for n in range(4, 40))]})
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


@pytest.mark.usefixtures("private", "fake_network")
def test_waiting_holds_no_decoder(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 1)
    both = threading.Barrier(8, timeout=20)

    def answer(request: Request) -> None:
        both.wait()  # for seven others
        request.reply(picture(len(request.path)))

    frame = pd.DataFrame({"path": [web.put(f"/{'a' * n}.png", answer) for n in range(8)]})
    assert nbfeat.extract(frame, BLOCK, images="path", allow_remote=True).failures.empty


@pytest.mark.usefixtures("private")
def test_no_more_are_asked_for_at_once_than_the_limit(web: Web) -> None:
    def answer(request: Request) -> None:
        time.sleep(0.02)
        request.reply(picture())

    urls = [web.put(f"/{n}.png", answer) for n in range(12)]
    with remote.Fetcher(HERE, remote.Access.here(Limits(at_once=3))) as fetch:
        threads = [threading.Thread(target=fetch, args=(url,)) for url in urls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(web.asked) == 12
    assert web.busiest <= 3


@pytest.mark.usefixtures("private", "fake_network")
def test_passwords_and_signatures_are_shown_nowhere(
    extract: Face, web: Web, photos: pd.DataFrame, own_cache: Path
) -> None:
    web.put("/lost.png?sig=hunter2", status(404))
    bad = web.url("/lost.png?sig=hunter2").replace("http://", "http://me:hunter2@")
    chain, within = f"simplecache::{bad}", f"folder/{bad}"
    frame = photos.assign(path=[f" {bad}\n", chain, within, *photos["path"][3:]])
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


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    "answer",
    [
        whole(picture()),
        whole(picture(), Content_Type="text/html; charset=utf-8"),
        whole(picture(), Content_Encoding="identity"),
        in_turn(status(500), status(503), whole(picture())),
        in_turn(status(429, Retry_After="0"), whole(picture())),
        in_turn(status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), whole(picture())),
    ],
    ids=["plain", "wrong type", "identity", "500 and 503 first", "429 first", "429 with a date first"],
)
def test_images_that_come(answer: Any, web: Web) -> None:
    assert fetched(web.put("/a.png", answer)) == picture()


@pytest.mark.usefixtures("private")
def test_an_answer_in_chunks(web: Web) -> None:
    def answer(request: Request) -> None:
        request.begin(Transfer_Encoding="chunked")
        data = picture()
        for part in (data[:7], data[7:100], data[100:]):
            request.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        request.wfile.write(b"0\r\n\r\n")

    assert fetched(web.put("/a.png", answer)) == picture()


def cut_off(request: Request) -> None:
    request.begin(Content_Length="1000")
    request.wfile.write(b"x" * 100)
    request.close_connection = True


@pytest.mark.usefixtures("private")
def test_a_connection_that_is_lost_is_tried_again(web: Web) -> None:
    assert fetched(web.put("/a.png", in_turn(cut_off, cut_off, whole(picture())))) == picture()
    assert len(web.asked) == 3


def endless(request: Request) -> None:
    request.begin()
    for _ in range(1000):
        request.wfile.write(b"x" * 100_000)
    request.server.answers["/end"] = status(200)  # nobody stopped it


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("answer", "words", "tries"),
    [
        (status(404), "not found (404)", 1),
        (status(410), "not found (410)", 1),
        (status(403), "permission denied (403)", 1),
        (status(401), "permission denied (401)", 1),
        (status(418), "the server answers 418", 1),
        (status(204), "the server answers 204 (no content)", 1),
        (status(302), "the server answers 302 (found)", 1),
        (status(500), "the server answers 500 (internal server error)", 3),
        (status(599), "the server answers 599", 3),
        (status(429, Retry_After="0"), "the server answers 429 (too many requests)", 3),
        (status(429, Retry_After="3600"), "429 (too many requests); it asks to come back in 3,600 s", 1),
        (whole(b""), "the answer is empty", 1),
        (cut_off, "the connection was lost", 3),
        (endless, "larger than 0.2 MB, the most that is fetched of an image", 1),
        (whole(b"x" * 300_000), "larger than 0.2 MB", 1),
        (whole(gzip.compress(b"x" * 10_000_000), Content_Encoding="gzip"), "the answer is compressed", 1),
        (whole(b"x", Content_Encoding="br"), "the answer is compressed", 1),
        (lambda request: request.wfile.write(b"220 ftp here\r\n"), "the server's answer is none of HTTP", 1),
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


@pytest.mark.usefixtures("private")
def test_a_length_that_is_too_large_is_believed_before_anything_is_read(web: Web) -> None:
    def answer(request: Request) -> None:
        request.begin(Content_Length="10000000000")
        request.hold()

    assert "larger than 0.2 MB" in reason(web.put("/a.png", answer))


@pytest.mark.usefixtures("private")
def test_a_server_that_does_not_answer(web: Web) -> None:
    said = reason(web.put("/a.png", Request.hold), Limits(answering=0.2, pause=0.01))
    assert said.startswith("no answer within 0.2 s: ")
    assert 0 < len(web.asked) <= 3


@pytest.mark.usefixtures("private")
def test_a_host_that_nobody_can_look_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = threading.Event()

    def lookup(*_: object, **__: object) -> None:
        waited.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    said = reason("http://slow.invalid/a.png", Limits(answering=0.1, pause=0.01))
    assert said == "no answer within 0.1 s: http://slow.invalid/a.png"
    waited.set()  # which ends the threads that look it up
    assert reason("http://slow.invalid/a.png").startswith("the host could not be looked up: ")
    assert web.asked == []


@pytest.mark.usefixtures("private")
def test_a_server_that_answers_a_byte_at_a_time(web: Web) -> None:
    def answer(request: Request) -> None:
        request.begin(Content_Length="100000")
        while not request.server.closing.wait(0.02):
            request.wfile.write(b"x")

    assert reason(web.put("/a.png", answer), Limits(seconds=0.5)).startswith("not fetched within 0.5 s: ")


@pytest.mark.usefixtures("private")
def test_headers_that_do_not_end(web: Web) -> None:
    def answer(request: Request) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(100_000):
            request.wfile.write(b"X-Header-%d: %s\r\n" % (number, b"x" * 1000))
        request.server.answers["/end"] = status(200)  # nobody stopped it

    assert reason(web.put("/a.png", answer)).startswith("the server's answer is none of HTTP: ")
    assert "/end" not in web.answers


@pytest.mark.usefixtures("private")
def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = reason(f"http://127.0.0.1:{free.getsockname()[1]}/a.png", Limits(pause=0.01))
    assert said.startswith("the connection failed (connection refused): ")


@pytest.mark.usefixtures("private")
def test_a_host_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lost)
    assert reason("https://nowhere.invalid/a.png") == "no such host: https://nowhere.invalid/a.png"


@pytest.mark.parametrize("address", ["http://", "https:///a.png", "http://exa mple:99999/a.png", "http://[::1/a.png"])
def test_addresses_that_cannot_be_asked_for(address: str) -> None:
    assert reason(address).startswith("no address that could be asked for: ")


# Redirects


@pytest.mark.usefixtures("private")
def test_redirects_are_followed(web: Web) -> None:
    web.put("/a b/5.png", picture())
    web.answers["/a%20b/5.png"] = whole(picture())
    web.put("/4", redirect("/a b/5.png", 308))
    web.put("/3", redirect("4", 307))
    web.put("/2", redirect(web.url("/3"), 303))
    web.put("/1", redirect("/2", 301))
    assert fetched(web.put("/0", redirect("/1"))) == picture()


@pytest.mark.usefixtures("private")
def test_redirects_that_do_not_end(web: Web) -> None:
    assert reason(web.put("/a", redirect("/a"))).startswith("redirected more than 5 times: ")
    assert len(web.asked) == 6


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("ftp://example.org/a.png", "redirected to ftp:, which is not followed"),
        ("file:///etc/passwd", "redirected to file:, which is not followed"),
        ("s3://bucket/a.png", "redirected to s3:, which is not followed"),
        ("http://[::1/", "no address that could be asked for"),
    ],
)
def test_redirects_that_are_not_followed(to: str, words: str, web: Web) -> None:
    assert words in reason(web.put("/a", redirect(to)))


@pytest.mark.usefixtures("private")
def test_a_password_goes_to_no_other_server(web: Web) -> None:
    with Web() as other:
        url = web.put("/a", redirect("/b"))
        web.put("/b", redirect(other.put("/c.png", picture())))
        assert fetched(url.replace("http://", "http://me:hunter2@")) == picture()
        assert ["Authorization" in headers for headers in web.headers + other.headers] == [True, True, False]


@pytest.mark.usefixtures("private")
def test_headers_of_a_bucket_go_to_no_other_server(web: Web, limits: Limits) -> None:
    async def get(asked: download.Asked) -> bytes:
        async with download.session(limits, private=True) as session:
            return await download.get(session, asked, limits)

    with Web() as other:
        url = web.put("/a", redirect("/b"))
        web.put("/b", redirect(other.put("/c.png", picture())))
        assert asyncio.run(get(download.Asked(url, "it", {"Authorization": "Bearer hunter2"}))) == picture()
        assert ["Authorization" in headers for headers in web.headers + other.headers] == [True, True, False]


@pytest.mark.usefixtures("private")
def test_what_is_quoted_stays_as_it_is(web: Web) -> None:
    path = "/a%2Fb/c%20d.png?X-Amz-Credential=AKIA%2F2026&s=%2B%2f"
    assert fetched(web.put(path, picture())) == picture()
    assert web.asked == [path]
    web.answers["/%C3%A9%20.png"] = whole(picture())
    assert fetched(web.url("/é .png")) == picture()


# Private machines


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]"])
def test_private_machines_are_not_connected_to(host: str, web: Web) -> None:
    said = reason(f"http://{host}:{web.server_port}/a.png")
    assert "is a private address, which is only connected to where NBFEAT_REMOTE_PRIVATE=1 is set: http://" in said
    assert web.asked == []


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize("host", ["2130706433", "0", "127.1"])
def test_numbers_that_some_take_for_machines_are_none(host: str, web: Web) -> None:
    assert reason(f"http://{host}:{web.server_port}/a.png").startswith("no address that could be asked for")


@pytest.mark.usefixtures("this_machine_is_public")
def test_a_redirect_to_a_private_machine_is_not_followed(web: Web) -> None:
    with Web("127.0.0.2") as inner:
        url = web.put("/a.png", redirect(inner.put("/secret.png", picture())))
        assert reason(url).startswith("127.0.0.2 is a private address")
        assert web.asked == ["/a.png"]
        assert inner.asked == []


@pytest.mark.usefixtures("this_machine_is_public")
def test_a_name_that_is_looked_up_again_cannot_lead_elsewhere(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with Web("127.0.0.2", web.server_port) as inner:
        answers = iter(["127.0.0.1"])
        looked_up = []

        def lookup(host: Any, port: Any, *_: object, **__: object) -> list[Any]:
            looked_up.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.2"), int(port)))]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        web.put("/a.png", picture(1))
        inner.put("/a.png", picture(2))
        url = f"http://rebinding.example:{web.server_port}/a.png"
        assert fetched(url) == picture(1)
        assert len(looked_up) == 1
        assert reason(url).startswith("127.0.0.2 is a private address")
        assert inner.asked == []


@pytest.mark.usefixtures("this_machine_is_public")
def test_of_a_name_with_several_machines_only_public_ones_are_asked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with Web("127.0.0.2", web.server_port) as inner:
        found = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]

        def lookup(host: Any, port: Any, *_: object, **__: object) -> list[Any]:  # as the system's
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (machine, int(port))) for machine in found]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        url = f"http://several.example:{web.server_port}/a.png"
        web.put("/a.png", picture())
        assert fetched(url) == picture()
        found.pop()
        assert "is a private address" in reason(url)
        assert inner.asked == []


@pytest.mark.usefixtures("this_machine_is_public")
def test_a_proxy_of_the_environment_is_not_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with Web("127.0.0.2") as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        assert fetched(web.put("/a.png", picture())) == picture()
        assert reason("http://10.0.0.1/a.png").startswith("10.0.0.1 is a private address")
        assert proxy.asked == []


def test_redirects_from_https_to_http_are_not_followed() -> None:
    import yarl

    from nbfeat.images.download import Asked, _redirected

    asked = Asked("https://example.org/a", "https://example.org/a")
    here = yarl.URL(asked.url)
    assert str(_redirected(here, "//other.org/b", asked)) == "https://other.org/b"
    with pytest.raises(ImageError, match="redirected from https to http, which is not followed"):
        _redirected(here, "http://example.org/b", asked)


def test_a_server_whose_certificate_nobody_vouches_for(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(public_hosts.PRIVATE, "1")
    web.socket = certified(tmp_path).wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
    url = web.put("/a.png", picture()).replace("http://", "https://")
    assert reason(url) == f"the server's certificate is not valid: {url}"
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


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("zip://c.png::{}", "no such member of the archive: c.png in "),
        ("zip://a.png::{}x", "no such archive: "),
        ("zip://folder/::{}", "a folder, not a file: folder/"),
        ("zip://empty.png::{}", "the file is empty: empty.png"),
        ("zip://bomb.png::{}", "too large for an image (10,000,000 bytes): bomb.png"),
        ("zip://packed.png::{}", "compressed in another way than deflate"),
        ("zip://a.png", "zip addresses are read only of an archive on this machine"),
        ("zip://::{}", "zip addresses are read only of an archive on this machine"),
        ("zip://a.png::", "zip addresses are read only of an archive on this machine"),
        ("zip://a.png::zip://b.zip::{}", "zip addresses are read only of an archive on this machine"),
        ("zip://a.png::https://example.org/b.zip", "zip addresses are read only of an archive on this machine"),
        ("zip://a.png::file://{}", "zip addresses are read only of an archive on this machine"),
        ("zip://a.png::simplecache::s3://b/c.zip", "zip addresses are read only of an archive on this machine"),
        ("zip://a.png::/dev/zero", "a folder, pipe or device, not an archive: /dev/zero"),
        ("zip://a.png::/", "a folder, pipe or device, not an archive: /"),
        ("zip://a.png::\0", "the path holds a character that no file name can: "),
    ],
)
def test_members_that_are_not_read(address: str, words: str, archive: Path) -> None:
    assert reason(address.format(archive)).startswith(words)


def test_archives_that_are_damaged(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    broken = tmp_path / "broken.zip"
    broken.write_bytes(data[: len(data) // 2])
    assert reason(f"zip://inner/a.png::{broken}").startswith("the archive is damaged, or is no zip: ")
    at = data.index(picture())
    broken.write_bytes(data[: at + 50] + b"\xff" * 9 + data[at + 59 :])
    assert reason(f"zip://inner/a.png::{broken}").startswith("the archive is damaged, or is no zip: ")


def test_a_member_that_is_larger_than_it_says_is_read_no_further(tmp_path: Path) -> None:
    path = tmp_path / "lying.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("bomb.png", bytes(10_000_000), zipfile.ZIP_DEFLATED)
    data = path.read_bytes().replace((10_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    path.write_bytes(data)
    assert reason(f"zip://bomb.png::{path}").startswith("the archive is damaged")


def test_more_archives_than_stay_open(tmp_path: Path) -> None:
    urls = []
    for number in range(20):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as out:
            out.writestr("a.png", picture(number))
        urls.append(f"zip://a.png::{number}.zip")
    with remote.Fetcher(tmp_path) as fetch, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, urls * 20)) == [picture(number) for number in range(20)] * 20
        assert len(fetch._archives._open) <= 8
    with pytest.raises(ImageError, match="the run was stopped before it was read"):
        fetch(urls[0])


@pytest.mark.usefixtures("fake_network")
@every_face
def test_every_face_reads_archives(extract: Face, archive: Path) -> None:
    frame = pd.DataFrame({"path": [f"zip://inner/a.png::{archive}", "zip://b?#.png::many.zip"]})
    result = extract(frame, BLOCK, images="path", allow_remote=True, root=str(archive.parent))
    assert result.failures.empty


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


@pytest.mark.usefixtures("private")
def test_an_image_in_a_bucket_of_amazon(bucket: str) -> None:
    assert fetched(f"{bucket}/a b.png") == picture()


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://photos/lost.png", "not found (404): s3://photos/lost.png"),
        ("s3://lost-bucket/a.png", "not found (404): s3://lost-bucket/a.png"),
        ("s3://photos", "an address of a bucket, not of an image in it: s3://photos"),
        ("s3://!!/a.png", "s3: addresses cannot be signed (ParamValidationError): s3://!!/a.png"),
    ],
)
@pytest.mark.usefixtures("bucket")
def test_images_in_buckets_that_are_not_there(address: str, words: str) -> None:
    assert reason(address) == words


@pytest.mark.usefixtures("private", "fake_network")
def test_a_run_over_a_bucket(extract: Face, bucket: str) -> None:
    frame = pd.DataFrame({"path": [f"{bucket}/a b.png", f"{bucket}/lost.png"]})
    result = extract(frame, BLOCK, images="path", allow_remote=True)
    assert result.failures["reason"].tolist() == [f"not found (404): {bucket}/lost.png"]
    assert "hunter2" not in repr(result).lower()


def test_the_endpoint_of_the_environment_counts_only_where_private_machines_are_allowed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def lookup(host: Any, *given: Any, **more: Any) -> Any:
        looked_up.append(host)
        if host != "127.0.0.1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert reason(f"{bucket}/a b.png").startswith("s3: addresses cannot be signed (EndpointConnectionError): ")
    assert looked_up
    assert all(host.endswith(".amazonaws.com") for host in looked_up)
    monkeypatch.setenv(public_hosts.PRIVATE, "1")
    assert fetched(f"{bucket}/a b.png") == picture()


@pytest.mark.usefixtures("private")
def test_without_credentials_a_bucket_is_asked_as_anybody_may(
    bucket: str, amazon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = seen(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fetched(f"{bucket}/a b.png")
    assert [request.url for request in asked] == [f"{amazon}/photos/a%20b.png"]


def seen(monkeypatch: pytest.MonkeyPatch) -> list[download.Asked]:
    """Take down what is asked for, and answer it."""
    asked: list[download.Asked] = []

    async def get(_: object, request: download.Asked, __: Limits) -> bytes:
        asked.append(request)
        return b"x"

    monkeypatch.setattr(download, "get", get)
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


@pytest.mark.usefixtures("private")
def test_an_image_in_a_bucket_of_google(google: Web) -> None:
    path = "/download/storage/v1/b/photos/o/folder%2Fa%20b%3F.png?alt=media"
    google.put(path, picture())
    assert fetched("gs://photos/folder/a b?.png") == picture()
    assert reason("gs://photos/lost.png?x=hunter2") == "not found (404): gs://photos/lost.png?…"
    assert reason("gs://photos") == "an address of a bucket, not of an image in it: gs://photos"


@pytest.mark.usefixtures("google")
def test_an_emulator_of_google_is_asked_only_where_private_machines_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gcsfs.credentials import GoogleCredentials

    asked = seen(monkeypatch)
    monkeypatch.setattr(GoogleCredentials, "apply", lambda _, out: out.update(Authorization="Bearer hunter2"))
    fetched("gs://photos/a.png")
    assert asked[0].url == "https://storage.googleapis.com/download/storage/v1/b/photos/o/a.png?alt=media"
    assert asked[0].headers == {"Authorization": "Bearer hunter2"}
    assert "hunter2" not in asked[0].name


# Without what it takes


@pytest.mark.parametrize(
    ("module", "address"),
    [
        ("aiohttp", "https://example.org/a.png"),
        ("s3fs", "s3://bucket/a.png"),
        ("gcsfs", "gs://bucket/a.png"),
    ],
)
def test_without_the_extra_the_sentence_says_how_to_get_it(
    module: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert reason(address) == (
        f"{address[: address.index(':')]}: addresses need {module}, which is not here: pip install 'nbfeat[remote]'"
    )


def test_nothing_of_the_extra_is_imported_for_files(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("aiohttp", "fsspec", "s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with remote.Fetcher(HERE) as fetch:
        assert load_image(photos["path"].iloc[0], HERE, fetch)[0] == Path(photos["path"].iloc[0]).read_bytes()
        assert fetch._line is None


def test_a_fetcher_that_is_closed_fetches_nothing() -> None:
    fetch = remote.Fetcher(HERE)
    fetch.close()
    with pytest.raises(ImageError, match=r"the run was stopped before it was fetched: https://example\.org/a\.png\?…$"):
        fetch("https://example.org/a.png?sig=hunter2")
    fetch.close()
