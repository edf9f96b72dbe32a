"""Holds Kubernetes manifests and a Compose file against what the worker knows."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import httpx
from typer.testing import CliRunner

from tests.support.places import ROOT
from tests.support.worker_samples import Ticks, sample_vitals
from worker.cli.main import app
from worker.service.endpoints import make_app
from worker.service.metrics import Metrics
from worker.settings.settings import Settings, known_settings
from worker.settings.sources import CONFIG_VARIABLE

Manifest = Mapping[str, Any]

SECRETS_FOLDER = "/run/secrets"
PROBES = {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}

# What each pod is to be allowed, and each container: nothing.
LOCKED_POD = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "securityContext.runAsNonRoot": True,
    "securityContext.seccompProfile.type": "RuntimeDefault",
}
LOCKED_CONTAINER = {
    "securityContext.allowPrivilegeEscalation": False,
    "securityContext.readOnlyRootFilesystem": True,
    "securityContext.capabilities.drop": ["ALL"],
}
LOCKED_SERVICE = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
}
UNITS = {"Mi": 2**20, "Gi": 2**30}


def at(manifest: Any, path: str) -> Any:
    """Return what stands at a dotted path; None if nothing does."""
    for part in path.split("."):
        if isinstance(manifest, Mapping):
            manifest = manifest.get(part)
        elif isinstance(manifest, list) and int(part) < len(manifest):
            manifest = manifest[int(part)]
        else:
            return None
    return manifest


def faults_of_kubernetes(manifests: Sequence[Manifest]) -> list[str]:
    """Say what in manifests of one file is not as the worker needs it."""
    kinds = {manifest["kind"]: manifest for manifest in manifests}
    found: list[str] = []
    if deployment := kinds.get("Deployment"):
        found += faults_of_deployment(deployment)
        found += faults_of_budget(kinds.get("PodDisruptionBudget", {}), deployment)
    if cron := kinds.get("CronJob"):
        found += faults_of_cron(cron)
    unknown = kinds.keys() - {"Deployment", "PodDisruptionBudget", "CronJob"}
    return [*found, *(f"nothing is known of a {kind}" for kind in unknown)]


def faults_of_deployment(deployment: Manifest) -> Iterator[str]:
    template = at(deployment, "spec.template")
    yield from _differences(deployment, {"spec.replicas": 2})
    yield from faults_of_pod(template["spec"])
    container = template["spec"]["containers"][0]
    yield from faults_of_ports(container)
    for probe in PROBES:
        yield from faults_of_probe(container, probe)
    yield from faults_of_scrape(at(template, "metadata.annotations"))
    if container.get("args", []) not in ([], ["fleet", "work"]):
        yield "what ends by itself a Deployment starts again and again"
    if at(deployment, "spec.selector.matchLabels") != at(template, "metadata.labels"):
        yield "the Deployment does not select its own pods"


def faults_of_budget(budget: Manifest, deployment: Manifest) -> Iterator[str]:
    if at(budget, "spec.selector") != at(deployment, "spec.selector"):
        yield "the budget is not that of the Deployment's pods"
    if at(budget, "spec.maxUnavailable") != 1:
        yield "of two pods one may be away"
    yield from _differences(budget, {"spec.unhealthyPodEvictionPolicy": "AlwaysAllow"})


def faults_of_cron(cron: Manifest) -> Iterator[str]:
    job = at(cron, "spec.jobTemplate.spec")
    yield from _differences(cron, {"spec.concurrencyPolicy": "Forbid"})
    yield from _differences(job, {"backoffLimit": 0, "template.spec.restartPolicy": "Never"})
    yield from faults_of_pod(at(job, "template.spec"))
    if "--once" not in (at(job, "template.spec.containers.0.args") or []):
        yield "without --once a run never ends"


def faults_of_pod(pod: Manifest) -> Iterator[str]:
    """Look at what pods of both kinds have in common."""
    yield from _differences(pod, LOCKED_POD)
    user = at(pod, "securityContext.runAsUser")
    group = at(pod, "securityContext.runAsGroup")
    if f"{user}:{group}" != image()["USER"]:
        yield f"the image's user is {image()['USER']}, not {user}:{group}"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        yield from faults_of_container(pod, container)


def faults_of_container(pod: Manifest, container: Manifest) -> Iterator[str]:
    yield from _differences(container, LOCKED_CONTAINER)
    yield from faults_of_image(container["image"])
    yield from faults_of_arguments(container.get("args", []))
    yield from faults_of_variables(each["name"] for each in container.get("env", []))
    yield from faults_of_secrets(pod, container)
    yield from faults_of_memory(container["resources"], container.get("args", []))


def faults_of_secrets(pod: Manifest, container: Manifest) -> Iterator[str]:
    """Follow the mount to its volume, whose files the group of the pod must be able to read."""
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    mount = mounts.get(SECRETS_FOLDER)
    if mount is None:
        yield f"nothing is mounted at {SECRETS_FOLDER}"
        return
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    secret = at(volumes, f"{mount['name']}.secret")
    if secret is None:
        yield f"there is no secret volume {mount['name']}"
        return
    group = at(pod, "securityContext.fsGroup") == at(pod, "securityContext.runAsGroup")
    if not (group and secret["defaultMode"] & 0o040):
        yield "the worker's group cannot read the secrets"
    if secret["defaultMode"] & 0o007:
        yield "everybody can read the secrets"


def faults_of_ports(container: Manifest) -> Iterator[str]:
    given = {each["name"]: each.get("value") for each in container.get("env", [])}
    port = int(given.get("USERS_SYNC_HTTP__PORT") or Settings().http.port)
    if [each["containerPort"] for each in container["ports"]] != [port]:
        yield f"the worker listens on port {port}"


def faults_of_probe(container: Manifest, name: str) -> Iterator[str]:
    probe = container.get(name)
    if probe is None:
        yield f"there is no {name}"
        return
    asked = probe["httpGet"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    if asked["port"] not in {*ports, *ports.values()}:
        yield f"{name} asks port {asked['port']}, which is none of the container's"
    if asked["path"] not in served():
        yield f"the worker does not serve {asked['path']}"
    elif asked["path"] != PROBES[name]:
        yield f"{name} is for {PROBES[name]}"
    if probe["timeoutSeconds"] >= probe["periodSeconds"]:
        yield f"{name} begins before the one before it has ended"


def faults_of_scrape(annotations: Manifest) -> Iterator[str]:
    yield from _differences(
        {name.partition("/")[2]: value for name, value in annotations.items()},
        {"scrape": "true", "path": "/metrics", "port": str(Settings().http.port)},
    )


def faults_of_memory(resources: Manifest, arguments: Sequence[str]) -> Iterator[str]:
    request, limit = (amount(at(resources, f"{each}.memory")) for each in ("requests", "limits"))
    if request > limit:
        yield "more memory is requested than allowed"
    if [*arguments] == ["fleet", "work"] and limit < 1.5e6 * Settings().fleet.memory_mb:
        yield "the mirrors of a fleet may take nearly all the memory that is allowed"


def faults_of_compose(compose: Manifest) -> Iterator[str]:
    service = compose["services"]["users-sync"]
    yield from _differences(service, LOCKED_SERVICE)
    yield from faults_of_image(service["image"])
    yield from faults_of_variables([*service["environment"], *service["secrets"]])
    yield from faults_of_arguments(service.get("command", []))
    if not (ROOT / "ops" / service["build"] / "Dockerfile").is_file():
        yield f"there is no Dockerfile in {service['build']}"
    for name in {*service["secrets"]} ^ {*compose["secrets"]}:
        yield f"the secret {name} is not both defined and used"
    for name, secret in compose["secrets"].items():
        if not secret["file"].endswith(f"/{name}"):
            yield f"the file of {name} has another name"
    port = Settings().http.port
    if service["ports"] != [f"127.0.0.1:{port}:{port}"]:
        yield f"the endpoints are on port {port}, for this machine alone"


def faults_of_image(name: str) -> Iterator[str]:
    if name.rpartition(":")[2] != project()["version"]:
        yield f"the image is not that of version {project()['version']}: {name}"


def faults_of_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """Have the command line read them; with --help nothing else is done."""
    ended = CliRunner().invoke(app, [*arguments, "--help"])
    if ended.exit_code:
        yield f"the worker does not take {' '.join(arguments)}"


def faults_of_variables(names: Iterator[str] | Sequence[str]) -> Iterator[str]:
    known = {variable for each in known_settings().values() for variable in each}
    for name in names:
        if name not in known | {CONFIG_VARIABLE}:
            yield f"{name} is no variable of the worker"


def amount(text: str) -> int:
    """Read an amount of memory, such as 192Mi, in bytes."""
    return int(text[:-2]) * UNITS[text[-2:]]


@cache
def image() -> Mapping[str, str]:
    """Return the instructions of the Dockerfile; where one comes twice, the last one counts."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    return dict(re.findall(r"^([A-Z]+) (.+)$", text, re.MULTILINE))


@cache
def project() -> Mapping[str, Any]:
    found: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return dict(found["project"])


@cache
def served() -> frozenset[str]:
    """Ask a worker's endpoints for every path that is named anywhere."""
    health = sample_vitals(Ticks())
    transport = httpx.WSGITransport(make_app(health, Metrics(health.read)))
    with httpx.Client(transport=transport, base_url="http://worker") as client:
        paths = (*PROBES.values(), "/metrics", "/")
        return frozenset(
            path for path in paths if client.get(path).status_code != httpx.codes.NOT_FOUND
        )


def _differences(manifest: Manifest, expected: Mapping[str, Any]) -> Iterator[str]:
    for path, value in expected.items():
        if (found := at(manifest, path)) != value:
            yield f"{path} is {found!r}, not {value!r}"
