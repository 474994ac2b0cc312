"""Addresses of pictures: one deadline, one size limit, no private networks, one class of errors."""

import gzip
import io
import socket
import threading
import time
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from ovis25.processing import download as module
from ovis25.processing.download import ALLOW_PRIVATE, download
from ovis25.processing.image import image_size, open_image


@pytest.fixture
def serve(monkeypatch):
    """A server on this machine that answers each connection with a function of it; gives its address."""
    monkeypatch.setenv(ALLOW_PRIVATE, "1")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    listeners = []

    def start(answer: Callable[[socket.socket], None] | bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def loop():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(65536)
                        connection.sendall(answer) if isinstance(answer, bytes) else answer(connection)
                    except OSError:
                        continue

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


def ok(body: bytes, *headers: str) -> bytes:
    head = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def drips(head: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    return answer


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Header: ",
        b"HTTP/1.1 2",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: ",
    ],
)
def test_one_deadline_holds_for_all_of_an_answer(serve, monkeypatch, head):
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.4)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"http://127.0.0.1:\d+/a.png took longer than 0.4 s"):
        download(serve(drips(head)) + "/a.png")
    assert time.monotonic() - start < 3


def test_a_server_that_says_nothing(serve, monkeypatch):
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(ValueError, match="took longer than 0.3 s"):
        download(serve(lambda connection: time.sleep(1)))


def test_a_picture_is_fetched(serve):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(buffer, "PNG")
    content = buffer.getvalue()
    for answer in (
        ok(content),
        ok(gzip.compress(content), "Content-Encoding: gzip"),
        ok(zlib.compress(content), "Content-Encoding: deflate"),
        b"HTTP/1.0 200 OK\r\n\r\n" + content,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(content), content),
    ):
        address = serve(answer) + "/Katze Größe.png?a=b c#d"
        assert download(address) == content
        assert image_size(address) == (40, 60) and open_image(address).getpixel((0, 0)) == (255, 0, 0)


def test_redirects_are_followed(serve):
    target = serve(ok(b"here"))
    for status in (301, 302, 303, 307, 308):
        there = f"HTTP/1.1 {status} There\r\nLocation: {target}/b\r\nContent-Length: 0\r\n\r\n".encode()
        assert download(serve(there)) == b"here"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP Error 404: Not Found"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "ended after 5 of 100 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc", "cannot be fetched"),
        (b"nonsense\r\n\r\n", "cannot be fetched: .*nonsense"),
        (b"HTTP/1.1 9999 x\r\n\r\n", "cannot be fetched"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "cannot be fetched"),
        (b"", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 300 + b"\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000 + b"\r\n\r\n", "cannot be fetched"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "leads to file:///etc/passwd, which",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://example.org/a\r\n\r\n", "no http"),
        (b"HTTP/1.1 302 Found\r\nLocation: data:image/png;base64,aa\r\n\r\n", "no http"),
        (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", "leads on more than 10 times"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::\r\n\r\n", "cannot be fetched"),
        (ok(b"x", "Content-Encoding: br"), "sent as br"),
        (ok(b"no gzip", "Content-Encoding: gzip"), "cannot be fetched"),
    ],
)
def test_a_bad_answer_is_one_error(serve, answer, message):
    with pytest.raises(ValueError, match=message) as caught:
        download(serve(answer))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("http://127.0.0.1")


@pytest.mark.parametrize(
    "address",
    [
        "http://", "http://:80", "http://127.0.0.1:99999999", "http://127.0.0.1:x/", "http://[::1", "https://\u2603/a",
        "http://a..b/", "http://" + "a" * 300, "http://127.0.0.1:1/", "http://a\nb/", "http://nobody.invalid/a.png",
        "https://127.0.0.1:1/" + "y" * 9000,
    ],
)  # fmt: skip
def test_a_bad_address_is_one_error(serve, address):
    with pytest.raises(ValueError, match="cannot be fetched") as caught:
        open_image(address)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_size_limit_holds_while_decompressing(serve, monkeypatch):
    monkeypatch.setattr(module, "DOWNLOAD_BYTES", 2**20)
    assert len(download(serve(ok(bytes(2**20))))) == 2**20
    bomb = gzip.compress(bytes(2**26))
    assert len(bomb) < 2**17
    for answer in (ok(bytes(2**20 + 1)), ok(bomb, "Content-Encoding: gzip")):
        with pytest.raises(ValueError, match="larger than 1 MiB"):
            download(serve(answer))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "[::1]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1",
        "2130706433", "0x7f.1", "127.1",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(monkeypatch, host):
    monkeypatch.delenv(ALLOW_PRIVATE, raising=False)
    monkeypatch.setattr(module, "_connected", lambda *_: pytest.fail("connected"))
    # or this machine does not know the family of addresses
    with pytest.raises(ValueError, match=f"a private address; set {ALLOW_PRIVATE}=1|cannot be fetched: .*Errno"):
        download(f"http://{host}/a.png")


def test_a_name_is_looked_at_after_its_resolution(monkeypatch):
    monkeypatch.delenv(ALLOW_PRIVATE, raising=False)
    places = [("93.184.216.34", 80), ("10.0.0.1", 80)]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ValueError, match="inner.example is 10.0.0.1, a private address"):
        download("http://inner.example/a.png")


def test_every_redirect_is_looked_at(serve, monkeypatch):
    secret = serve(ok(b"secret"))
    door = serve(f"HTTP/1.1 302 Found\r\nLocation: {secret}\r\n\r\n".encode())
    port = int(door.rpartition(":")[2])
    monkeypatch.delenv(ALLOW_PRIVATE)
    resolve, is_public = socket.getaddrinfo, module._is_public
    asked = []

    def getaddrinfo(host, *arguments, **options):
        asked.append(host)
        return resolve("127.0.0.1" if host == "door.example" else host, *arguments, **options)

    monkeypatch.setattr(module.socket, "getaddrinfo", getaddrinfo)
    # the first host counts as a public one
    monkeypatch.setattr(module, "_is_public", lambda text: asked == ["door.example"] or is_public(text))
    with pytest.raises(ValueError, match="127.0.0.1 is 127.0.0.1, a private address"):
        download(f"http://door.example:{port}/a.png")
    assert asked == ["door.example", "127.0.0.1"]


def test_a_proxy_of_the_environment_is_used(serve, monkeypatch):
    seen = []

    def answer(connection: socket.socket) -> None:
        connection.sendall(ok(b"through"))

    proxy = serve(answer)
    monkeypatch.setenv("http_proxy", proxy.replace("http://", "http://user:word@"))
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv(ALLOW_PRIVATE)
    original = module._response
    monkeypatch.setattr(
        module, "_response", lambda connection, selector, headers: seen.append((selector, headers))
        or original(connection, selector, headers),
    )  # fmt: skip
    assert download("http://nobody.invalid/a.png") == b"through"
    selector, headers = seen[0]
    assert selector == "http://nobody.invalid/a.png" and headers["Host"] == "nobody.invalid"
    assert headers["Proxy-Authorization"].startswith("Basic ")
    with pytest.raises(ValueError, match="a private address"):
        download("http://10.0.0.1/a.png")
