"""What `deploy/` holds is valid, hardened, and true of the service that it deploys.

As far as files can say: no Docker and no cluster runs here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import promql_parser
import pytest
import yaml
from bentoml._internal.container.generate import DEFAULT_BENTO_ENVS
from prometheus_client.parser import text_string_to_metric_families

from fathom.client import Client, ServiceError
from fathom.feature_store import FeatureStoreConfig
from fathom.service import RankingService
from fathom.serving import ServingConfig
from running_service import Running

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
MANIFESTS: dict[str, Any] = {
    document["kind"]: document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if document["kind"] != "Kustomization"
}
KUSTOMIZATION = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
POD: dict[str, Any] = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/fathom.json").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())


def labels(name: str) -> dict[str, Any]:
    found: dict[str, Any] = MANIFESTS[name]["spec"]["selector"]
    return found


# -- forms ----------------------------------------------------------------------------------------


def compose_faults(path: Path) -> str:
    """What the compose specification's own schema says against a file."""
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout if done.returncode else ""


def test_the_compose_file_is_one(tmp_path: Path) -> None:
    assert compose_faults(DEPLOY / "compose.yaml") == ""
    wrong = tmp_path / "compose.yaml"
    services = SERVICES | {"service": SERVICES["service"] | {"prots": []}}
    wrong.write_text(yaml.safe_dump(COMPOSE | {"services": services}))
    assert "prots" in compose_faults(wrong)


@pytest.mark.parametrize("kind", sorted(MANIFESTS))
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_each_manifest_is_what_kubernetes_takes(kind: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[kind], version, strict=True)
    wrong = MANIFESTS[kind] | {"specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="specs"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_every_manifest_is_applied() -> None:
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert {*KUSTOMIZATION["resources"], "kustomization.yaml"} == files
    assert {name for name in MANIFESTS if name != "Namespace"} == {
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy"),
        *("PodDisruptionBudget", "Service"),
    }
    for kind, manifest in MANIFESTS.items():
        if kind != "Namespace":
            assert manifest["metadata"]["namespace"] == KUSTOMIZATION["namespace"]


def test_selectors_find_the_pods() -> None:
    pods = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    policy = MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for wanted in (
        labels("Deployment")["matchLabels"],
        labels("PodDisruptionBudget")["matchLabels"],
        labels("Service"),
        policy,
    ):
        assert wanted.items() <= pods.items()
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "fathom")
    # Two writers of one number would fight.
    assert "replicas" not in MANIFESTS["Deployment"]["spec"]


# -- safety ---------------------------------------------------------------------------------------


def test_images_have_versions() -> None:
    images = [part["image"] for part in SERVICES.values()] + [CONTAINER["image"]]
    assert images.count(CONTAINER["image"]) == 1
    for image in images:
        if image.startswith("${"):  # to be named: there is no default that could be `latest`
            assert re.fullmatch(r"\$\{FATHOM_IMAGE:\?.+\}", image)
        else:
            assert re.fullmatch(r"[a-z0-9./-]+:[\w.-]+", image), image
            assert not image.endswith(":latest")
    (replaced,) = KUSTOMIZATION["images"]
    assert CONTAINER["image"].startswith(replaced["name"] + ":")


def test_nothing_secret_is_in_a_file() -> None:
    assert "Secret" not in MANIFESTS
    assert {"secretRef": {"name": "fathom-keys"}} in CONTAINER["envFrom"]
    for part in SERVICES.values():
        for name, value in part.get("environment", {}).items():
            if re.search("PASSWORD|KEY|TOKEN|SECRET", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            # A password may be named, as $NAME, and not be given.
            assert re.findall(r"password=(?!\$[A-Z_]+)", path.read_text()) == [], path


def test_containers_can_change_nothing_and_become_nobody() -> None:
    for part in SERVICES.values():
        assert part["read_only"] is True
        assert part["cap_drop"] == ["ALL"]
        assert part["security_opt"] == ["no-new-privileges:true"]
        assert part["mem_limit"]
        # Open to this machine alone.
        assert all(port.startswith("127.0.0.1:") for port in part.get("ports", []))
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    # The image's user: `bento__uid_gid` of the Dockerfile that BentoML writes.
    assert POD["securityContext"]["runAsUser"] == DEFAULT_BENTO_ENVS["uid_gid"]


def test_what_is_written_has_a_place() -> None:
    """BentoML's home and temporary files: tried with a root file system mounted read-only."""
    config = MANIFESTS["ConfigMap"]["data"]
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert config["BENTOML_HOME"] == config["HOME"] == "/tmp"
    assert "/tmp" in mounts
    environment = SERVICES["service"]["environment"]
    assert environment["BENTOML_HOME"] == environment["HOME"] == "/tmp"
    assert SERVICES["service"]["tmpfs"][0].startswith("/tmp:")


def test_the_public_sees_the_api_alone() -> None:
    (rule,) = MANIFESTS["Ingress"]["spec"]["rules"]
    paths = {path["path"] for path in rule["http"]["paths"]}
    assert paths == {"/rank", "/recommend", "/predict", "/model"}
    assert {path["pathType"] for path in rule["http"]["paths"]} == {"Exact"}
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (ingress,) = policy["ingress"]
    assert all("namespaceSelector" in source for source in ingress["from"])
    assert [port["port"] for port in ingress["ports"]] == [CONTAINER["ports"][0]["containerPort"]]


# -- truth ----------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """Text with compose's variables given."""
    return re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", r"/given/\1", text)


@pytest.mark.parametrize(
    "environment", [SERVICES["service"]["environment"], MANIFESTS["ConfigMap"]["data"]]
)
def test_settings_are_what_the_service_takes(environment: dict[str, str]) -> None:
    store = json.loads(filled(environment["FATHOM_FEATURE_STORE"]))
    root = store.pop("root")
    assert Path(root).is_absolute()
    config = FeatureStoreConfig(**store)
    assert config.online_store["type"] == "redis"
    # A Redis that is down is noticed within the time that the service waits for it.
    serving = ServingConfig.model_validate_json(filled(environment["FATHOM_SERVING"]))
    timeouts = re.findall(r"timeout=([\d.]+)", config.online_store["connection_string"])
    assert len(timeouts) == 2
    assert all(float(seconds) <= serving.read_seconds for seconds in timeouts)


def test_the_features_are_mounted_where_they_are_looked_for() -> None:
    compose = SERVICES["service"]
    store = json.loads(filled(compose["environment"]["FATHOM_FEATURE_STORE"]))
    serving = json.loads(filled(compose["environment"]["FATHOM_SERVING"]))
    mounts = compose["volumes"]
    wanted = {f"{store['root']}/{store['folder']}", serving["registry"]}
    assert {filled(mount["target"]) for mount in mounts} == wanted
    # Nothing of it is written by the service.
    assert all(m["target"] == m["source"] and m["read_only"] for m in mounts)
    config = MANIFESTS["ConfigMap"]["data"]
    store, serving = (json.loads(config[f"FATHOM_{n}"]) for n in ("FEATURE_STORE", "SERVING"))
    mounted = {m["mountPath"]: m for m in CONTAINER["volumeMounts"] if m["name"] == "data"}
    assert set(mounted) == {f"{store['root']}/{store['folder']}", serving["registry"]}
    for path, mount in mounted.items():
        assert mount["readOnly"] is True
        assert f"/fathom/{mount['subPath']}" == path


def test_a_pod_drains_before_it_is_killed() -> None:
    wait = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    service: Any = RankingService
    answering = service.config["traffic"]["timeout"]
    assert POD["terminationGracePeriodSeconds"] >= wait + answering
    assert int(SERVICES["service"]["stop_grace_period"].removesuffix("s")) >= answering
    strategy = MANIFESTS["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy["maxUnavailable"] == 0


def test_prometheus_and_grafana_find_what_they_read() -> None:
    (scraped,) = PROMETHEUS["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == ["service:3000"]
    assert "--port=3000" in SERVICES["service"]["command"]
    assert all((DEPLOY / "prometheus" / name).is_file() for name in PROMETHEUS["rule_files"])

    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    used = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]}
    used |= {t["datasource"]["uid"] for panel in DASHBOARD["panels"] for t in panel["targets"]}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards/fathom.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    folder = DEPLOY / next(k for k, v in mounts.items() if v == provider["options"]["path"])
    assert [path.name for path in folder.iterdir()] == ["fathom.json"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_panels_have_their_own_places() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


# -- a real service's metrics ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics(service: Running) -> dict[str, set[str]]:
    """Every sample's name → the names of its labels, after a ranking and a refusal."""
    with Client(service.url) as client:
        client.rank("u2", ["i1"], {"shelf": "low", "shop": "shop1", "discount": 0.1})
        client.predict(service.artifact.rows)
        with pytest.raises(ServiceError):
            client.rank("u2", [])
    text = httpx.get(f"{service.url}/metrics", trust_env=False).text
    found: defaultdict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
    # What Prometheus adds by itself.
    return {name: {*labels, "instance", "job"} for name, labels in found.items()} | {
        "up": {"instance", "job"}
    }


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def selectors(expression: str) -> list[Any]:
    """The metrics that an expression reads, with their matchers; raises what Prometheus would."""
    found: list[Any] = []

    def collect(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), collect)
    return found


@pytest.mark.e2e
@pytest.mark.parametrize(("where", "expression"), expressions())
def test_what_is_drawn_or_watched_is_there(
    metrics: dict[str, set[str]], where: str, expression: str
) -> None:
    read = selectors(expression)
    assert read, where
    for selector in read:
        assert selector.name in metrics, where
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= metrics[selector.name], where


@pytest.mark.e2e
def test_every_metric_of_fathom_is_drawn(metrics: dict[str, set[str]]) -> None:
    drawn = {s.name for _, expression in expressions() for s in selectors(expression)}
    ours = {name for name in metrics if name.startswith("fathom_") and "_bucket" not in name}
    assert len(ours) >= 8
    assert {name for name in ours if not name.endswith(("_sum", "_count", "_created"))} <= drawn


@pytest.mark.e2e
def test_probes_ask_what_the_service_answers(service: Running) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = CONTAINER[probe]["httpGet"]["path"]
        assert httpx.get(f"{service.url}{path}", trust_env=False).status_code == 200, probe
    # Who is not ready must not be started again for it.
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/livez"
