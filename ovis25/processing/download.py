"""Files behind http(s) addresses: one deadline, one size limit, no way into private networks.

Addresses come from data and requests, that is from strangers. Each name is resolved once, every address that it has is
looked at, and the connection goes to what was looked at; so it is at each redirect.
"""

import base64
import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import zlib
from http import HTTPStatus

from ovis25.text import shorten

# how long a fetch may take in all, redirects included, and how large the file may be
DOWNLOAD_SECONDS = 30.0
DOWNLOAD_BYTES = 64 * 2**20
# the environment variable that opens private, loopback and link-local addresses where it is 1
ALLOW_PRIVATE = "OVIS25_ALLOW_PRIVATE_ADDRESSES"

_CHUNK = 2**16
_MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"User-Agent": "ovis25", "Accept-Encoding": "identity", "Connection": "close"}
# what an address may hold beside letters and digits; the rest is percent-encoded as browsers do
_ADDRESS_MARKS = "%/:=&?~#+!$,;'@()*[]"
# IPv6 addresses that stand for an IPv4 address behind a translator
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(address: str) -> bytes:
    """The file behind an http(s) address.

    Raises:
        ValueError: no valid address, unreachable, too slow, too large, or in a private network (see ALLOW_PRIVATE).
    """
    with _Deadline(DOWNLOAD_SECONDS) as deadline:
        try:
            return _fetch(address, deadline)
        except Exception as error:
            # http.client, ssl, zlib and the socket each have their own classes
            if deadline.is_over:
                problem = f"took longer than {DOWNLOAD_SECONDS:g} s"
            else:
                problem = f"cannot be fetched: {' '.join(str(error).split()) or type(error).__name__}"
            raise ValueError(f"{_shown(address)} {problem}") from error


class _Deadline:
    """Ends every wait on the sockets that it watches when the time is over."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        self._timer.cancel()
        for connection in self._sockets:
            connection.close()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def remaining(self) -> float:
        if self.is_over:
            raise TimeoutError
        return self._end - time.monotonic()

    def watch(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(self.remaining())
        self._sockets.append(connection)
        return connection

    def _shut(self) -> None:
        for connection in self._sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # closed already
                continue


def _fetch(address: str, deadline: _Deadline) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        response = _answer(address, deadline)
        if response.status not in _REDIRECTS:
            if response.status != HTTPStatus.OK:
                raise ValueError(f"HTTP Error {response.status}: {response.reason}")
            return _body(response, deadline)
        target = urllib.parse.urljoin(address, response.getheader("Location") or "")
        if not target.startswith(("http://", "https://")):
            raise ValueError(f"it leads to {_shown(target)}, which is no http(s) address")
        address = target
    raise ValueError(f"it leads on more than {_MAX_REDIRECTS} times")


def _answer(address: str, deadline: _Deadline) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(urllib.parse.quote(address, safe=_ADDRESS_MARKS))
    if not parts.hostname:
        raise ValueError("it names no host")
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        return _answer_through_proxy(parts, proxy, deadline)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port or kind.default_port, timeout=deadline.remaining())
    raw = deadline.watch(_connected(_resolved(parts.hostname, connection.port), deadline))
    # a connection that has its socket makes none of its own
    connection.sock = _secured(raw, parts.hostname, deadline) if parts.scheme == "https" else raw
    return _response(connection, _selector(parts), _HEADERS)


def _answer_through_proxy(parts, proxy: str, deadline: _Deadline) -> http.client.HTTPResponse:
    """The proxy of the environment resolves names, so only what this machine knows of them is looked at."""
    with contextlib.suppress(socket.gaierror):
        _resolved(parts.hostname, parts.port or 80)
    via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    headers, credentials = dict(_HEADERS), {}
    if via.username:
        pair = f"{urllib.parse.unquote(via.username)}:{urllib.parse.unquote(via.password or '')}"
        credentials = {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(via.hostname, via.port or 80, timeout=deadline.remaining())
        connection.set_tunnel(parts.hostname, parts.port, credentials)
        selector = _selector(parts)
    else:
        connection = http.client.HTTPConnection(via.hostname, via.port or 80, timeout=deadline.remaining())
        headers |= {**credentials, "Host": parts.netloc.rpartition("@")[2]}
        selector = urllib.parse.urlunsplit(parts._replace(fragment=""))
    connection.connect()
    deadline.watch(connection.sock)
    return _response(connection, selector, headers)


def _selector(parts: urllib.parse.SplitResult) -> str:
    return urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))


def _response(connection, selector: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    connection.request("GET", selector, headers=headers)
    return connection.getresponse()


def _resolved(host: str, port: int) -> list[tuple]:
    """What `socket.getaddrinfo` says of a name, each address looked at."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if os.environ.get(ALLOW_PRIVATE, "").lower() not in ("1", "true"):
        for *_, place in found:
            if not _is_public(place[0]):
                raise ValueError(f"{host} is {place[0]}, a private address; set {ALLOW_PRIVATE}=1 to allow these")
    return found


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None:
            return _is_public(str(inner))
    return address.is_global and not address.is_multicast


def _connected(found: list[tuple], deadline: _Deadline) -> socket.socket:
    """A socket to the first address that answers."""
    reason: OSError | None = None
    for family, kind, protocol, _, place in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(deadline.remaining())
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            reason = error
    raise reason or OSError("its name has no address")


def _secured(raw: socket.socket, host: str, deadline: _Deadline) -> socket.socket:
    return deadline.watch(ssl.create_default_context().wrap_socket(raw, server_hostname=host))


def _body(response: http.client.HTTPResponse, deadline: _Deadline) -> bytes:
    encoding = (response.getheader("Content-Encoding") or "identity").lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise ValueError(f"it is sent as {encoding}, though identity was asked for")
    # servers that compress unasked; 47: with a gzip or zlib header
    expand = None if encoding == "identity" else zlib.decompressobj(47)
    body, num_received = bytearray(), 0
    while piece := response.read1(_CHUNK):
        deadline.remaining()
        num_received += len(piece)
        body += piece if expand is None else expand.decompress(piece, DOWNLOAD_BYTES + 1 - len(body))
        if len(body) > DOWNLOAD_BYTES:
            raise ValueError(f"it is larger than {DOWNLOAD_BYTES // 2**20} MiB")
    # a socket that was shut in the middle looks like the end of the file
    deadline.remaining()
    promised = response.getheader("Content-Length") or ""
    if promised.isdecimal() and num_received < int(promised):
        raise ValueError(f"the connection ended after {num_received} of {promised} bytes")
    return bytes(body)


def _shown(address: str) -> str:
    """The address in a message, without quotes where it is of common length."""
    return address if len(address) <= 200 and address.isprintable() else shorten(address, 200)
