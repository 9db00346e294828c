"""Access control, for every combination of keys and peers."""

from __future__ import annotations

import pytest

from server.http.app import ADMIN_ROUTES, CLIENT_ROUTES, METRICS_ROUTES, PROBE_ROUTES
from server.http.auth import Keyring
from tests.server.http.conftest import MakeClient

HERE, ELSEWHERE = "127.0.0.1", "203.0.113.9"


def status(make_client: MakeClient, path: str, key: str | None, host: str = HERE, **settings: object) -> int:
    method = next(
        method
        for method, each, _ in (*PROBE_ROUTES, *CLIENT_ROUTES, *METRICS_ROUTES, *ADMIN_ROUTES)
        if each == path
    )
    headers = {} if key is None else {b"Authorization": f"Bearer {key}".encode()}
    return (
        make_client(host, **settings)
        .request(method, path.replace("{model:path}", "tiny"), headers=headers)
        .status_code
    )


def paths(rows: object) -> list[str]:
    assert isinstance(rows, tuple)
    return [path for _, path, _ in rows]


@pytest.mark.parametrize("path", paths(PROBE_ROUTES))
def test_probes_need_no_key(make_client: MakeClient, path: str) -> None:
    assert status(make_client, path, None, ELSEWHERE, api_keys=("k",), admin_key="a") == 200


@pytest.mark.parametrize("path", paths((*CLIENT_ROUTES, *METRICS_ROUTES)))
class TestClientRoutes:
    def test_open_without_keys(self, make_client: MakeClient, path: str) -> None:
        assert status(make_client, path, None, ELSEWHERE) in (200, 415)
        assert status(make_client, path, None, ELSEWHERE, admin_key="a") in (200, 415)

    @pytest.mark.parametrize("key", [None, "", "wrong", "k1 k2", "K1", "k1x", "ü"])
    def test_other_keys_are_refused(self, make_client: MakeClient, path: str, key: str | None) -> None:
        assert status(make_client, path, key, HERE, api_keys=("k1", "k2")) == 401

    @pytest.mark.parametrize("key", ["k1", "k2", "a"])
    def test_each_key_is_accepted(self, make_client: MakeClient, path: str, key: str) -> None:
        assert status(make_client, path, key, ELSEWHERE, api_keys=("k1", "k2"), admin_key="a") in (200, 415)


@pytest.mark.parametrize("path", paths(ADMIN_ROUTES))
class TestAdminRoutes:
    @pytest.mark.parametrize("host", [HERE, "::1", "::ffff:127.0.0.1", "127.8.8.8"])
    def test_without_an_admin_key_admin_routes_are_open_to_this_machine(
        self, make_client: MakeClient, path: str, host: str
    ) -> None:
        assert status(make_client, path, None, host) in (200, 415)

    @pytest.mark.parametrize("host", [ELSEWHERE, "2001:db8::1", "::ffff:203.0.113.9", "testclient", ""])
    def test_without_an_admin_key_admin_routes_are_closed_to_others(
        self, make_client: MakeClient, path: str, host: str
    ) -> None:
        assert status(make_client, path, "k", host, api_keys=("k",)) == 403

    def test_on_this_machine_admin_routes_need_a_client_key_if_there_are_any(
        self, make_client: MakeClient, path: str
    ) -> None:
        assert status(make_client, path, None, HERE, api_keys=("k",)) == 401
        assert status(make_client, path, "k", HERE, api_keys=("k",)) in (200, 415)

    def test_with_an_admin_key_only_this_key_opens_admin_routes(
        self, make_client: MakeClient, path: str
    ) -> None:
        for host in (HERE, ELSEWHERE):
            assert status(make_client, path, None, host, api_keys=("k",), admin_key="a") == 401
            assert status(make_client, path, "k", host, api_keys=("k",), admin_key="a") == 401
            assert status(make_client, path, "a", host, api_keys=("k",), admin_key="a") in (200, 415)


def test_headers_do_not_make_a_peer_local(make_client: MakeClient) -> None:
    headers = {"X-Forwarded-For": HERE, "Forwarded": f"for={HERE}", "Host": "localhost"}
    assert make_client(ELSEWHERE).get("/v1/adapters", headers=headers).status_code == 403


def test_a_refusal_says_how_to_send_a_key(make_client: MakeClient) -> None:
    response = make_client(api_keys=("k",)).get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "Bearer" in response.json()["error"]["message"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_case_insensitive(make_client: MakeClient, scheme: str) -> None:
    client = make_client(api_keys=("k",))
    assert client.get("/v1/models", headers={"Authorization": f"{scheme} k"}).status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "Basic k"}).status_code == 401


def test_a_keyring_does_not_hold_its_keys_in_the_clear() -> None:
    ring = Keyring(["visible"])
    assert ring.holds("visible")
    assert "visible" not in repr(vars(ring))


@pytest.mark.parametrize("path", paths((*CLIENT_ROUTES, *ADMIN_ROUTES)))
@pytest.mark.parametrize("admin_key", [None, "a"])
def test_a_metrics_key_opens_nothing_else(make_client: MakeClient, path: str, admin_key: str | None) -> None:
    settings: dict[str, object] = {"api_keys": ("k",), "admin_key": admin_key, "metrics_key": "m"}
    assert status(make_client, path, "m", HERE, **settings) == 401


def test_a_metrics_key_closes_the_metrics_and_opens_them(make_client: MakeClient) -> None:
    closed: dict[str, object] = {"api_keys": ("k",), "admin_key": "a", "metrics_key": "m"}
    for key, expected in {"m": 200, "k": 200, "a": 200, "x": 401, None: 401}.items():
        assert status(make_client, "/metrics", key, ELSEWHERE, **closed) == expected
    # Where clients need no key, the metrics still need theirs.
    assert status(make_client, "/metrics", None, HERE, metrics_key="m") == 401
    assert status(make_client, "/metrics", "m", HERE, metrics_key="m") == 200
    assert status(make_client, "/v1/models", None, HERE, metrics_key="m") == 200
