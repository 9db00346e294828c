"""The examples in ``deploy/`` and the Dockerfile are valid and agree with the code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.config import ServerConfig, from_args
from server.config.options import OPTIONS
from server.finetune.jobs.runner import STOP_GRACE_SECONDS
from server.http.app import METRICS_ROUTES, PROBE_ROUTES
from server.serve import _CLOSE_SECONDS
from tests.support.project import ROOT, instructions, last_environment, stages, tool

DEPLOY = ROOT / "deploy"
VARIABLES = {option.variable for option in OPTIONS}
STATE = dict(instructions("cuda"))["VOLUME"]
PORT = 8000


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


COMPOSE = read("compose.yaml")
SERVERS: dict[str, Any] = {name: COMPOSE["services"][name] for name in ("cpu", "gpu")}
KUBERNETES = {
    document["kind"]: document
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
}
DEPLOYMENT = KUBERNETES["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
EACH_SERVER = pytest.mark.parametrize("service", SERVERS.values(), ids=list(SERVERS))


def test_the_dockerfile_has_no_fault() -> None:
    tool("hadolint", "Dockerfile")


def test_the_compose_file_follows_the_specification() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


@pytest.mark.parametrize("kind", KUBERNETES)
def test_kubernetes_takes_each_resource(kind: str) -> None:
    kubernetes_validate.validate(KUBERNETES[kind], "1.37", strict=True)


# -- options: the server understands the arguments of a container ------------------------------------


def config_of(arguments: list[str], environ: Mapping[str, str]) -> ServerConfig:
    """The server's config for these arguments. Fails if one of our variables has no option."""
    assert {name for name in environ if name.startswith("MANYLORA_")} <= VARIABLES
    assert arguments[0] == "serve"
    return from_args(arguments[1:], environ)


def image_environ(target: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in last_environment(target))


def interpolated(text: str, environ: Mapping[str, str]) -> str:
    """Substitute Compose's ``${NAME:-default}``."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: environ.get(match[1]) or match[2], text)


def compose_config(server: str, environ: Mapping[str, str]) -> ServerConfig:
    service = SERVERS[server]
    given = {
        name: interpolated(str(value), environ) if value is not None else environ[name]
        for name, value in service["environment"].items()
        if value is not None or name in environ
    }
    return config_of(["serve"], image_environ(service["build"]["target"]) | given)


@pytest.mark.parametrize("server", SERVERS)
def test_compose_gives_options_and_keys(server: str) -> None:
    plain = compose_config(server, {})
    assert plain.http.api_keys == ()
    assert (plain.http.admin_key, plain.http.metrics_key) == (None, None)
    assert (plain.home, plain.http.port) == (Path(STATE), PORT)
    keys = {"MANYLORA_API_KEY": "a,b", "MANYLORA_METRICS_KEY": "m", "MANYLORA_ADMIN_KEY": "root"}
    closed = compose_config(server, keys | {"MANYLORA_BASE": "org/model"})
    assert closed.http.api_keys == ("a", "b")
    assert (closed.http.admin_key, closed.http.metrics_key) == ("root", "m")
    assert closed.model.name == "org/model"


def pod_environ(secrets: Mapping[str, str]) -> dict[str, str]:
    environ: dict[str, str] = image_environ("cuda") | KUBERNETES["ConfigMap"]["data"]
    assert CONTAINER["envFrom"] == [{"configMapRef": {"name": KUBERNETES["ConfigMap"]["metadata"]["name"]}}]
    for variable in CONTAINER["env"]:
        environ[variable["name"]] = secrets[variable["valueFrom"]["secretKeyRef"]["key"]]
    return environ


def test_the_pod_gives_options_and_keys() -> None:
    environ = pod_environ({"clients": "a,b", "metrics": "m", "admin": "root"})
    config = config_of(CONTAINER["args"], environ)
    assert config.http.api_keys == ("a", "b")
    assert (config.http.admin_key, config.http.metrics_key) == ("root", "m")
    assert (config.model.device, config.home, config.http.port) == ("cuda", Path(STATE), PORT)


def test_no_file_contains_a_key() -> None:
    assert "Secret" not in KUBERNETES
    assert not any("value" in variable for variable in CONTAINER["env"])
    for variables in (COMPOSE["x-server"]["environment"], KUBERNETES["ConfigMap"]["data"]):
        plain = {name for name, value in variables.items() if value and not str(value).startswith("${")}
        assert not any("KEY" in name for name in plain)
    assert not any(
        "KEY" in rest for target in stages() for word, rest in instructions(target) if word == "ENV"
    )


def test_the_services_own_variables_are_kept_from_the_server() -> None:
    """A service of this name makes Kubernetes set MANYLORA_PORT to a URL."""
    assert f"{KUBERNETES['Service']['metadata']['name'].upper()}_PORT" in VARIABLES
    assert POD["enableServiceLinks"] is False


# -- network ---------------------------------------------------------------------------------------


def paths(rows: Any) -> set[str]:
    return {path for method, path, _ in rows if method == "GET"}


def test_probes_ask_routes_that_need_no_key() -> None:
    probes = {
        name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert {probe["path"] for probe in probes.values()} <= paths(PROBE_ROUTES)
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert probes["readinessProbe"]["path"] == "/ready"  # a draining server is still alive
    assert probes["livenessProbe"]["path"] == "/health"
    patience = CONTAINER["startupProbe"]["periodSeconds"] * CONTAINER["startupProbe"]["failureThreshold"]
    assert patience >= 1800  # the first start fetches and quantises the base


def test_ports_agree() -> None:
    assert dict(instructions("cuda"))["EXPOSE"] == str(PORT)
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": PORT}]
    (port,) = KUBERNETES["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"
    for service in SERVERS.values():
        assert [published.split(":") for published in service["ports"]] == [["127.0.0.1", "8000", str(PORT)]]


def test_selectors_find_the_pod() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    monitor = read("podmonitor.yaml")["spec"]
    for selector in (DEPLOYMENT["selector"], monitor["selector"]):
        assert selector == {"matchLabels": labels}
    assert KUBERNETES["Service"]["spec"]["selector"] == labels


def test_the_pod_monitor_reads_the_metrics_with_their_key() -> None:
    (endpoint,) = read("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] in paths(METRICS_ROUTES)
    assert endpoint["port"] in {port["name"] for port in CONTAINER["ports"]}
    (given,) = (variable for variable in CONTAINER["env"] if variable["name"] == "MANYLORA_METRICS_KEY")
    assert endpoint["authorization"]["credentials"] == given["valueFrom"]["secretKeyRef"]


def test_prometheus_reads_the_metrics_with_their_key() -> None:
    (scrape,) = read("prometheus.yaml")["scrape_configs"]
    assert scrape["metrics_path"] in paths(METRICS_ROUTES)
    ((host, _, port),) = (target.partition(":") for target in scrape["static_configs"][0]["targets"])
    assert port == str(PORT)
    assert all(host in service["networks"]["default"]["aliases"] for service in SERVERS.values())
    assert all(host == service["hostname"] for service in SERVERS.values())  # the Host that it sends
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert COMPOSE["secrets"][secret] == {"environment": "MANYLORA_METRICS_KEY"}
    mounts = [mount.split(":")[0] for mount in COMPOSE["services"]["prometheus"]["volumes"]]
    assert "./prometheus.yaml" in mounts


# -- rights, files, shutdown -----------------------------------------------------------------------


def test_the_pod_has_no_rights_and_writes_where_the_server_does() -> None:
    user = int(dict(instructions("cuda"))["USER"])
    wanted = {"runAsNonRoot": True, "runAsUser": user, "fsGroup": user}
    assert wanted.items() <= POD["securityContext"].items()
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {STATE, "/tmp"}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    claim = volumes[mounts[STATE]]["persistentVolumeClaim"]["claimName"]
    assert claim == KUBERNETES["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes[mounts["/tmp"]]["emptyDir"] == {}


@EACH_SERVER
def test_compose_gives_no_rights_and_room_to_write(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["tmpfs"] == ["/tmp"]
    mounts = dict(interpolated(mount, {}).split(":") for mount in service["volumes"])
    assert mounts == {"state": STATE, "adapters": f"{STATE}/adapters"}
    assert mounts.keys() <= COMPOSE["volumes"].keys()
    made = next(rest for word, rest in instructions("cpu") if word == "RUN" and "useradd" in rest)
    assert f"{STATE}/adapters" in made  # so that a new volume belongs to the server's user


def test_all_written_files_are_in_the_volume() -> None:
    """Triton's compiled kernels and the hub's files are written to HOME."""
    environ = image_environ("cuda")
    assert environ["HOME"] == environ["MANYLORA_HOME"] == STATE


def test_a_server_has_enough_time_to_shut_down() -> None:
    pod = config_of(["serve"], pod_environ({"clients": "a", "metrics": "m", "admin": "root"}))
    ends = [(POD["terminationGracePeriodSeconds"], pod)]
    for name, service in SERVERS.items():
        ends.append((int(service["stop_grace_period"].removesuffix("s")), compose_config(name, {})))
    for grace, config in ends:
        assert grace >= config.http.shutdown_timeout + _CLOSE_SECONDS + 10
        assert grace > STOP_GRACE_SECONDS


def test_one_server_has_one_gpu_and_one_state() -> None:
    assert DEPLOYMENT["replicas"] == 1
    assert DEPLOYMENT["strategy"] == {"type": "Recreate"}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    (device,) = SERVERS["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == (1, ["gpu"])
    assert "deploy" not in SERVERS["cpu"]


def test_the_two_servers_are_the_two_images() -> None:
    targets = {name: service["build"]["target"] for name, service in SERVERS.items()}
    assert targets == {"cpu": "cpu", "gpu": "cuda"}
    assert set(targets.values()) <= stages().keys()
    assert {name: service["profiles"] for name, service in SERVERS.items()} == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
    }
