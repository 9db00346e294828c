"""Without keys, a web page cannot use the server under any name. With keys, Host may be any name."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from server.config import HttpConfig
from server.http.app import (
    ADMIN_ROUTES,
    CLIENT_ROUTES,
    METRICS_ROUTES,
    PROBE_ROUTES,
    TRAINING_ROUTES,
    create_app,
)
from server.http.hosts import Names, parse_host
from tests.server.http.conftest import MakeClient
from tests.support.fake_service import FakeService
from tests.support.training_server import rows, training_server

ROUTES = [
    (method, path) for method, path, _ in (*PROBE_ROUTES, *CLIENT_ROUTES, *METRICS_ROUTES, *ADMIN_ROUTES)
]
HERE = {"Host": "127.0.0.1:8000"}


def code(make_client: MakeClient, headers: dict[str, str], path: str = "/v1/models", **config: object) -> str:
    """ "" if the request is taken, else the error's code."""
    response = make_client(**config).get(path, headers=headers)
    return "" if response.status_code == 200 else str(response.json()["error"]["code"])


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_rebound_name_reaches_no_route(make_client: MakeClient, method: str, path: str) -> None:
    url = path.replace("{model:path}", "tiny")
    response = make_client().request(method, url, headers={"Host": "rebound.example:8000"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
    assert "--allowed-hosts" in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
    ids=["origin", "null", "sec-fetch-site"],
)
def test_another_sites_page_reaches_no_route(
    make_client: MakeClient, method: str, path: str, headers: dict[str, str]
) -> None:
    url = path.replace("{model:path}", "tiny")
    response = make_client().request(method, url, headers=HERE | headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "--api-key" in response.json()["error"]["message"]


def test_another_sites_form_uploads_nothing(tmp_path: Path) -> None:
    """A browser sends a multipart form without a preflight request."""
    with training_server(tmp_path, FakeService()) as server:
        address = urlsplit(server.url)
        body = b"".join(
            (
                b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n',
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
                + rows()
                + b"\r\n",
                b"--b--\r\n",
            )
        )
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nOrigin: https://evil.example\r\n"
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
            connection.sendall(head.encode() + body)
            assert connection.recv(4096).startswith(b"HTTP/1.1 403")
        assert not server.client().files.list().data
    assert any(path == "/v1/files" for _, path, _ in TRAINING_ROUTES)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LocalHost.", "localhost:1", "a.localhost", "127.0.0.1", "127.9.9.9:80", "[::1]",
        "[::1]:80", "[::ffff:127.0.0.1]", "localhost:",
    ],
)  # fmt: skip
def test_loopback_names_are_accepted(make_client: MakeClient, host: str) -> None:
    assert code(make_client, {"Host": host}) == ""


@pytest.mark.parametrize(
    "host",
    [
        "localhost.evil.example", "evil.example", "evil-localhost", "127.0.0.1.evil.example", "192.168.1.5",
        "0.0.0.0", "[fe80::1%25eth0]", "[2001:db8::1]", "127.1", "gpubox", "..localhost.x",
    ],
)  # fmt: skip
def test_other_names_are_refused(make_client: MakeClient, host: str) -> None:
    assert code(make_client, {"Host": host}) == "host_not_allowed"


@pytest.mark.parametrize(
    "host", ["", "a b", "localhost@evil", "localhost/", "[::1", "::1", "a:b", "localhost:123456", "a,b", "ü"]
)
def test_an_invalid_host_is_a_bad_request(make_client: MakeClient, host: str) -> None:
    assert parse_host(host) is None or host == ""
    for keys in ((), ("k",)):
        client = make_client(api_keys=keys)
        headers = {b"Host": host.encode("latin-1"), b"Authorization": b"Bearer k"}
        assert client.get("/v1/models", headers=headers).json()["error"]["code"] == "bad_request"


@pytest.mark.parametrize(
    ("bind", "more", "host", "ours"),
    [
        ("10.0.0.7", (), "10.0.0.7", True),
        ("10.0.0.7", (), "10.0.0.8", False),
        ("10.0.0.7", (), "localhost", True),
        ("gpubox", (), "gpubox", True),
        ("2001:db8::1", (), "2001:db8::1", True),
        # A server on all addresses accepts each of them, and this machine's name.
        ("0.0.0.0", (), "192.168.1.5", True),
        ("::", (), "2001:db8::1", True),
        ("0.0.0.0", (), socket.gethostname().lower(), True),
        ("0.0.0.0", (), "server", False),
        ("0.0.0.0", ("server",), "server", True),
        ("127.0.0.1", ("*.example.com",), "a.b.example.com", True),
        ("127.0.0.1", ("*.example.com",), "example.com", False),
        ("127.0.0.1", ("*.example.com",), "evilexample.com", False),
        ("127.0.0.1", ("192.168.1.5",), "192.168.1.5", True),
        ("127.0.0.1", ("*",), "whatever.example", True),
    ],
)
def test_names(bind: str, more: tuple[str, ...], host: str, ours: bool) -> None:
    assert Names(bind, more).has(host) is ours


def test_listening_on_all_addresses_does_not_allow_pages_of_every_address(
    service: FakeService, config: HttpConfig
) -> None:
    app = create_app(service, replace(config, host="0.0.0.0"))
    with TestClient(app, base_url="http://192.168.1.5:8000") as client:
        assert client.get("/v1/models", headers={"Origin": "http://203.0.113.9"}).status_code == 403
        assert client.get("/v1/models", headers={"Origin": "http://192.168.1.5:3000"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8000", "https://[::1]"])
def test_pages_of_this_machine_are_accepted(make_client: MakeClient, origin: str) -> None:
    assert code(make_client, HERE | {"Origin": origin, "Sec-Fetch-Site": "same-site"}) == ""


def test_pages_of_an_allowed_host_are_accepted(make_client: MakeClient) -> None:
    headers = HERE | {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    assert code(make_client, headers) == "origin_not_allowed"
    assert code(make_client, headers, allowed_hosts=("chat.example",)) == ""


def test_with_keys_any_host_is_accepted_by_default(make_client: MakeClient) -> None:
    """A proxy with a key may send any Host. A web page has no key."""
    foreign = {"Host": "api.example", "Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    key = {"Authorization": "Bearer k"}
    assert code(make_client, foreign | key, api_keys=("k",)) == ""
    assert code(make_client, foreign, api_keys=("k",)) == "invalid_api_key"
    assert code(make_client, foreign | key, api_keys=("k",), allowed_hosts=("x",)) == "host_not_allowed"


def test_an_admin_key_alone_protects_no_client_route(make_client: MakeClient) -> None:
    assert code(make_client, {"Host": "rebound.example"}, admin_key="a") == "host_not_allowed"


def sent(address: str, request: str) -> bytes:
    """The first line of the answer to these bytes."""
    with socket.create_connection(
        (urlsplit(address).hostname, urlsplit(address).port), timeout=5
    ) as connection:
        connection.sendall(request.encode("latin-1"))
        return connection.makefile("rb").readline().strip()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET /v1/models HTTP/1.1\r\n\r\n", 400),  # RFC 9112, 3.2: Host is required
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        ("GET /v1/models HTTP/1.0\r\n\r\n", 200),  # load balancers' checks send it; browsers do not
        ("GET /v1/models HTTP/1.0\r\nHost: evil.example\r\n\r\n", 403),
        # A target in absolute form replaces Host (RFC 9112, 3.2.2).
        ("GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
        ("GET http://localhost:8000/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", 200),
        ("GET http://a@localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        # The server ignores an upgrade, and checks the request as any other.
        (
            "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            403,
        ),
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
        ("CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ],
)
def test_raw_requests(live: str, request_: str, status: int) -> None:
    assert sent(live, request_).split()[1] == str(status).encode()
