"""Kubernetes manifests: read as kustomize does, their pods as containers, and which pod reaches which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.native_containers import Container

Object = dict[str, Any]

LOOPBACK = {"DYN_HTTP_HOST": "127.0.0.1", "DYN_SYSTEM_HOST": "127.0.0.1"}
"""Pods have addresses of their own; the tests' processes listen only on this machine."""


def built(directory: Path) -> list[Object]:
    """Return the objects of a kustomization, which names its files and other kustomizations only."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    assert kustomization.keys() <= {"apiVersion", "kind", "resources", "images"}
    found: list[Object] = []
    for resource in kustomization["resources"]:
        path = directory / resource
        found += built(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    return found


def named(objects: list[Object], kind: str, name: str) -> Object:
    [found] = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def workloads(objects: list[Object]) -> list[Object]:
    """Return the objects that make pods."""
    return [each for each in objects if "template" in each.get("spec", {})]


def containers_of(workload: Object) -> list[Object]:
    """Return the containers of a workload's pods: sidecars, then the others."""
    spec = workload["spec"]["template"]["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return true if a selector of labels matches. An empty one matches all."""
    for name, value in selector.get("matchLabels", {}).items():
        if labels.get(name) != value:
            return False
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


# --------------------------------------------------------------------------- one pod as a container


def container(
    workload: Object, *, host: str, entrypoint: list[str], secret: Mapping[str, str], places: Path
) -> Container:
    """Return the main container of a workload's pod. Its volumes are directories below `places`, named by the
    host and the volume; that of a claim is named by the claim."""
    pod = workload["spec"]["template"]["spec"]
    [main] = pod["containers"]
    claims = {
        each["name"]: each["persistentVolumeClaim"]["claimName"]
        for each in pod.get("volumes", ())
        if "persistentVolumeClaim" in each
    }
    return Container(
        host=host,
        argv=[*main.get("command", entrypoint), *main["args"]],
        env=LOOPBACK | {each["name"]: _value(each, secret) for each in main["env"]},
        ports=[port["containerPort"] for each in containers_of(workload) for port in each["ports"]],
        mounts={
            each["mountPath"]: places / claims.get(each["name"], f"{host}-{each['name']}")
            for each in main["volumeMounts"]
        },
        read_only=main["securityContext"]["readOnlyRootFilesystem"],
    )


def _value(variable: Object, secret: Mapping[str, str]) -> str:
    if "value" in variable:
        return str(variable["value"])
    source = variable["valueFrom"]
    if "fieldRef" in source:
        assert source["fieldRef"]["fieldPath"] == "status.podIP"
        return "127.0.0.1"
    return secret[source["secretKeyRef"]["key"]]


# --------------------------------------------------------------------------- which pod reaches which


def reachable(objects: list[Object]) -> set[tuple[str, str, int]]:
    """Return each (component, other component, port) that the network policies allow in both directions.

    Only ports on which the other component's containers listen are looked at."""
    pods = {
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: each
        for each in workloads(objects)
    }
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    found = set()
    for source, caller in pods.items():
        for target, listener in pods.items():
            for name, port in _ports(listener):
                out = _allows(policies, "egress", caller, listener, (port,))
                into = _allows(policies, "ingress", listener, caller, (name, port))
                if source != target and out and into:
                    found.add((source, target, port))
    return found


def _ports(workload: Object) -> Iterator[tuple[str, int]]:
    for each in containers_of(workload):
        for port in each["ports"]:
            yield port["name"], port["containerPort"]


def _allows(
    policies: list[Object], direction: str, pod: Object, other: Object, ports: tuple[str | int, ...]
) -> bool:
    labels, others = (each["spec"]["template"]["metadata"]["labels"] for each in (pod, other))
    peers = "to" if direction == "egress" else "from"
    kind = direction.capitalize()
    mine = [each for each in policies if kind in each["policyTypes"] and selects(each["podSelector"], labels)]
    assert mine, "without a policy everything is allowed"
    for policy in mine:
        for rule in policy.get(direction, ()):
            is_port = any(each["port"] in ports for each in rule["ports"])
            is_peer = peers not in rule or any(
                "podSelector" in peer
                and "namespaceSelector" not in peer
                and selects(peer["podSelector"], others)
                for peer in rule[peers]
            )
            if is_port and is_peer:
                return True
    return False
