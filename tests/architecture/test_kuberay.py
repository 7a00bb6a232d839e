"""The files that run the service on Kubernetes, held against the code and the docs; they were only parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.architecture.deploy_files import DEPLOY, parsed, settings_of
from tests.support.paths import ROOT


def yaml_documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()))


def containers(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield from document.get("containers", ())
        document = list(document.values())
    if isinstance(document, list):
        for part in document:
            yield from containers(part)


def test_the_service_on_kubernetes_has_settings_that_load_and_a_command_that_parses(tmp_path: Path) -> None:
    documents = {document["kind"]: document for document in yaml_documents("service.yaml")}
    path = tmp_path / "potstill.toml"
    path.write_text(documents["ConfigMap"]["data"]["potstill.toml"])
    settings = settings_of(path)
    (container,) = containers(documents["Deployment"])
    parsed(container["args"])
    assert container["ports"][0]["containerPort"] == settings.port == documents["Service"]["spec"]["ports"][0]["port"]
    assert settings.ray is not None
    assert settings.access.keys_file is not None
    assert settings.limits.max_connections_per_address == 0  # an ingress is one address
    assert documents["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > settings.grace_seconds


def test_every_secret_on_kubernetes_stands_in_the_docs() -> None:
    guide = (ROOT / "docs" / "operations" / "kuberay.md").read_text()
    both = [*yaml_documents("service.yaml"), *yaml_documents("raycluster.yaml")]
    keys = set(re.findall(r"'key': '([\w-]+)'", str(both)))
    assert keys == set(re.findall(r"--from-(?:literal|file)=([\w-]+)=", guide))


def test_ray_on_kubernetes_is_the_ray_that_we_test() -> None:
    (cluster,) = yaml_documents("raycluster.yaml")
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    (deployment,) = (document for document in yaml_documents("service.yaml") if document["kind"] == "Deployment")
    images = {container["image"] for container in (*containers(cluster), *containers(deployment))}
    assert len(images) == 1
