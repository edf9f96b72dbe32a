"""Holds PromQL against the metrics that a worker shows: names, labels, and values of labels."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

# What Prometheus adds to each series when it reads it.
TARGET_LABELS = {"job", "instance"}

# Every word of the language that our expressions are written with.
WORDS = {
    *("sum", "min", "max", "by", "on", "without", "and", "or", "unless"),
    *("rate", "increase", "absent", "histogram_quantile"),
}

# A label with these values may have others, which no run shows all.
OPEN_VALUES = {"status": re.compile(r"\d{3}|timeout|error")}

TEXT = re.compile(r'"[^"]*"')
DURATION = re.compile(r"\[[^\]]*\]")
SELECTOR = re.compile(r"(?P<name>[a-z_]+)\s*\{(?P<matchers>[^}]*)\}")
MATCHER = re.compile(r'(?P<label>\w+)\s*(?P<how>=~|!~|!=|=)\s*"(?P<value>[^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|without)\s*\(([^)]*)\)")
COUNTED = re.compile(r"\b(?:rate|increase)\s*\(\s*([a-z_]+)")
OVER_TIME = re.compile(r"_(total|bucket|count|sum)$")

# What Grafana puts in, as one that has chosen everything would.
CHOSEN = {"$__rate_interval": "5m", "$job": ".*"}


@dataclass(frozen=True)
class Shown:
    """The series of one scrape: for each name its labels, and the values that they had."""

    labels: Mapping[str, Mapping[str, set[str]]] = field(default_factory=dict)

    def without(self, metric: str) -> "Shown":
        """Return the same without a metric, as after it was renamed."""
        of_it = {metric, *(f"{metric}_{part}" for part in ("bucket", "count", "sum"))}
        return Shown({name: labels for name, labels in self.labels.items() if name not in of_it})


def shown(text: str) -> Shown:
    """Read the answer of `/metrics`."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, defaultdict(set))
            for label, value in sample.labels.items():
                labels[label].add(value)
    return Shown(found)


def faults(expression: str, seen: Shown, legend: str = "") -> list[str]:
    """Say what in an expression no worker shows; `legend` is Grafana's name for its series."""
    for variable, value in CHOSEN.items():
        expression = expression.replace(variable, value)
    return [
        *_faults_of_names(expression, seen),
        *_faults_of_labels(expression, seen),
        *_faults_of_legend(expression, legend),
    ]


def _faults_of_names(expression: str, seen: Shown) -> Iterator[str]:
    bare = GROUPING.sub(" ", SELECTOR.sub(r"\g<name> ", DURATION.sub(" ", expression)))
    for word in re.findall(r"[A-Za-z_]\w*", TEXT.sub(" ", bare)):
        if word not in WORDS and word not in seen.labels:
            yield f"no worker shows {word}"
    for name in COUNTED.findall(expression):
        if not OVER_TIME.search(name):
            yield f"{name} is no counter"


def _faults_of_labels(expression: str, seen: Shown) -> Iterator[str]:
    for selector in SELECTOR.finditer(expression):
        known = seen.labels.get(selector["name"], {})
        for matcher in MATCHER.finditer(selector["matchers"]):
            yield from _faults_of_matcher(selector["name"], known, matcher)
    names = re.findall(r"users_sync_[a-z_]+", TEXT.sub("", expression))
    of_any = {label for name in names for label in seen.labels.get(name, {})}
    for label in grouped(expression):
        if label not in of_any | TARGET_LABELS:
            yield f"nothing in it has the label {label}"


def _faults_of_matcher(
    name: str, known: Mapping[str, set[str]], matcher: re.Match[str]
) -> Iterator[str]:
    label = matcher["label"]
    if label in TARGET_LABELS:
        return
    if label not in known:
        yield f"{name} has no label {label}"
        return
    values = matcher["value"].split("|") if "~" in matcher["how"] else [matcher["value"]]
    for value in values:
        open_values = OPEN_VALUES.get(label)
        if value not in known[label] and not (open_values and open_values.fullmatch(value)):
            yield f"{label} of {name} is never {value}"


def _faults_of_legend(expression: str, legend: str) -> Iterator[str]:
    kept = set(grouped(expression))
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        if kept and label not in kept:
            yield f"the legend names {label}, which is summed away"


def grouped(expression: str) -> list[str]:
    """Give the labels by which it groups or matches."""
    return [label.strip() for each in GROUPING.findall(expression) for label in each.split(",")]


def all_faults(expressions: Iterable[tuple[str, str]], seen: Shown) -> dict[str, list[str]]:
    """Give the faults of each expression, which comes with its legend, that has any."""
    found = {expression: faults(expression, seen, legend) for expression, legend in expressions}
    return {expression: each for expression, each in found.items() if each}
