"""The manifests in ops/ name what the worker knows, and a mistake in one is found."""

import re
from copy import deepcopy
from typing import Any

import pytest
import yaml

from tests.support.manifests import at, faults_of_compose, faults_of_kubernetes
from tests.support.places import ROOT
from worker.settings.names import WELL_KNOWN

OPS = ROOT / "ops"
KUBERNETES = sorted((OPS / "kubernetes").glob("*.yaml"))
DEPLOYMENT, CRON, COMPOSE = "kubernetes/deployment.yaml", "kubernetes/cronjob.yaml", "compose.yaml"
FLEET = "kubernetes/fleet.yaml"

ABSENT = object()
POD = "0.spec.template.spec"
JOB_POD = "0.spec.jobTemplate.spec.template.spec"
SERVICE = "0.services.users-sync"
# A mistake as the place and what stands there instead, and what is said of it.
Mistake = tuple[str, str, object, str]
MISTAKES: list[Mistake] = [
    (
        DEPLOYMENT,
        f"{POD}.containers.0.livenessProbe.httpGet.path",
        "/health",
        "does not serve /health",
    ),
    (DEPLOYMENT, f"{POD}.containers.0.livenessProbe.httpGet.path", "/readyz", "is for /healthz"),
    (DEPLOYMENT, f"{POD}.containers.0.readinessProbe.httpGet.port", "web", "asks port web"),
    (DEPLOYMENT, f"{POD}.containers.0.readinessProbe", ABSENT, "there is no readinessProbe"),
    (DEPLOYMENT, f"{POD}.containers.0.livenessProbe.timeoutSeconds", 10, "begins before"),
    (DEPLOYMENT, f"{POD}.containers.0.ports.0.containerPort", 8081, "listens on port 8080"),
    (DEPLOYMENT, f"{POD}.containers.0.args", ["--onse"], "does not take --onse"),
    (DEPLOYMENT, f"{POD}.containers.0.args", ["--once"], "again and again"),
    (DEPLOYMENT, f"{POD}.containers.0.image", "users-sync:0.0.9", "the image is not that of"),
    (
        DEPLOYMENT,
        f"{POD}.containers.0.env",
        [{"name": "USERS_SYNC_HTTP__PROT", "value": "1"}],
        "USERS_SYNC_HTTP__PROT is no variable",
    ),
    (
        DEPLOYMENT,
        f"{POD}.containers.0.env",
        [{"name": "USERS_SYNC_HTTP__PORT", "value": "9000"}],
        "listens on port 9000",
    ),
    (DEPLOYMENT, f"{POD}.containers.0.volumeMounts.0.mountPath", "/secrets", "nothing is mounted"),
    (DEPLOYMENT, f"{POD}.volumes.0.name", "secret", "there is no secret volume secrets"),
    (DEPLOYMENT, f"{POD}.volumes.0.secret.defaultMode", 0o400, "group cannot read"),
    (DEPLOYMENT, f"{POD}.volumes.0.secret.defaultMode", 0o444, "everybody can read"),
    (DEPLOYMENT, f"{POD}.securityContext.fsGroup", ABSENT, "group cannot read"),
    (DEPLOYMENT, f"{POD}.securityContext.runAsUser", 1000, "the image's user is 10001:10001"),
    (DEPLOYMENT, f"{POD}.securityContext.runAsNonRoot", ABSENT, "runAsNonRoot is None"),
    (DEPLOYMENT, f"{POD}.automountServiceAccountToken", ABSENT, "automountServiceAccountToken"),
    (DEPLOYMENT, f"{POD}.containers.0.securityContext.capabilities", ABSENT, "capabilities.drop"),
    (
        DEPLOYMENT,
        f"{POD}.containers.0.securityContext.readOnlyRootFilesystem",
        False,
        "readOnlyRootFilesystem is False",
    ),
    (DEPLOYMENT, f"{POD}.containers.0.resources.requests.memory", "1Gi", "more memory"),
    (DEPLOYMENT, "0.spec.replicas", 3, "spec.replicas is 3"),
    (DEPLOYMENT, "0.spec.template.metadata.labels", {"app": "sync"}, "select its own pods"),
    (
        DEPLOYMENT,
        "0.spec.template.metadata.annotations",
        {"prometheus.io/scrape": "true", "prometheus.io/port": "8080"},
        "path is None, not '/metrics'",
    ),
    (DEPLOYMENT, "1.spec.selector.matchLabels", {"app": "sync"}, "the budget is not that of"),
    (DEPLOYMENT, "1.spec.maxUnavailable", 2, "one may be away"),
    (DEPLOYMENT, "1.spec.unhealthyPodEvictionPolicy", ABSENT, "unhealthyPodEvictionPolicy"),
    (DEPLOYMENT, "1.kind", "Service", "nothing is known of a Service"),
    (FLEET, f"{POD}.containers.0.args", ["fleet", "works"], "does not take fleet works"),
    (FLEET, f"{POD}.containers.0.args", ["fleet", "init"], "again and again"),
    (FLEET, f"{POD}.containers.0.resources.limits.memory", "512Mi", "nearly all the memory"),
    (FLEET, f"{POD}.initContainers.0.args", ["fleet", "inti"], "does not take fleet inti"),
    (FLEET, f"{POD}.initContainers.0.securityContext", ABSENT, "readOnlyRootFilesystem is None"),
    (FLEET, f"{POD}.initContainers.0.volumeMounts", [], "nothing is mounted"),
    (FLEET, "1.spec.selector.matchLabels", {"app": "users-sync"}, "the budget is not that of"),
    (CRON, f"{JOB_POD}.containers.0.args", ABSENT, "never ends"),
    (CRON, f"{JOB_POD}.restartPolicy", "OnFailure", "restartPolicy is 'OnFailure'"),
    (CRON, "0.spec.concurrencyPolicy", "Allow", "concurrencyPolicy is 'Allow'"),
    (CRON, f"{JOB_POD}.volumes.0.secret.defaultMode", 0o400, "group cannot read"),
    (COMPOSE, f"{SERVICE}.environment", {"STACK_PROJECT": "x"}, "STACK_PROJECT is no variable"),
    (COMPOSE, f"{SERVICE}.secrets", ["DATABASE_URL"], "STACK_SECRET_SERVER_KEY is not both"),
    (COMPOSE, f"{SERVICE}.secrets.1", "DATABASE", "DATABASE is no variable"),
    (COMPOSE, "0.secrets.DATABASE_URL.file", "./secrets/url", "DATABASE_URL has another name"),
    (COMPOSE, f"{SERVICE}.ports", ["8080:8080"], "for this machine alone"),
    (COMPOSE, f"{SERVICE}.build", ".", "there is no Dockerfile in ."),
    (COMPOSE, f"{SERVICE}.read_only", ABSENT, "read_only is None"),
    (COMPOSE, f"{SERVICE}.command", ["demo", "--kept"], "does not take demo --kept"),
    (COMPOSE, f"{SERVICE}.image", "users-sync", "the image is not that of"),
]


def read(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((OPS / file).read_text("utf-8")))


def faults(file: str, documents: list[dict[str, Any]]) -> list[str]:
    if file == COMPOSE:
        return list(faults_of_compose(documents[0]))
    return faults_of_kubernetes(documents)


def changed(documents: list[dict[str, Any]], path: str, value: object) -> list[dict[str, Any]]:
    """Return a copy with another value at a place, or nothing."""
    copy = deepcopy(documents)
    above, _, last = path.rpartition(".")
    parent = at(copy, above)
    key = int(last) if isinstance(parent, list) else last
    if value is ABSENT:
        del parent[key]
    else:
        parent[key] = value
    return copy


@pytest.mark.parametrize("file", [DEPLOYMENT, FLEET, CRON, COMPOSE])
def test_manifest_names_what_the_worker_knows(file: str) -> None:
    assert faults(file, read(file)) == []


def test_every_manifest_is_looked_at() -> None:
    assert [f"kubernetes/{path.name}" for path in KUBERNETES] == [CRON, DEPLOYMENT, FLEET]


@pytest.mark.parametrize(("file", "path", "value", "fault"), MISTAKES)
def test_mistake_is_found(file: str, path: str, value: object, fault: str) -> None:
    found = faults(file, changed(read(file), path, value))
    assert [each for each in found if fault in each] != []


@pytest.mark.parametrize("place", ["ops/kubernetes/deployment.yaml", "docs/deploying.md"])
def test_secret_is_made_with_what_has_no_default(place: str) -> None:
    text = (ROOT / place).read_text("utf-8")
    [command] = re.findall(r"kubectl create secret generic users-sync((?:.*\\\n)*.*)", text)
    names = set(re.findall(r"--from-(?:literal|file)=([A-Z_]+)", command))
    required = (("stack", "project_id"), ("stack", "secret_server_key"), ("database", "url"))
    assert names == {WELL_KNOWN[setting][0] for setting in required}


@pytest.mark.parametrize("place", ["ops/kubernetes/fleet.yaml", "docs/fleet.md"])
def test_secret_of_the_fleet_is_made_with_its_control_database(place: str) -> None:
    text = (ROOT / place).read_text("utf-8")
    [command] = re.findall(r"kubectl create secret generic users-sync-fleet(.*\n.*)", text)
    assert "--from-file=FLEET_DATABASE_URL" in command
    assert WELL_KNOWN["fleet", "url"] == ("FLEET_DATABASE_URL",)


def test_secret_files_of_compose_are_ignored_by_git() -> None:
    assert "/ops/secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
