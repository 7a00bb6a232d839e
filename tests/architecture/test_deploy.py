"""The files that run the service elsewhere, held against the code and the docs: no Docker engine runs here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.student_trainer.config import TrainConfig
from potstill.teacher_service.settings.service import ServiceSettings
from tests.architecture.deploy_files import DEPLOY, parsed, settings_of
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.paths import ROOT
from tests.support.processes.servers import hosted, serving_teachers

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
JOBS = {name for name, service in SERVICES.items() if "profiles" in service}
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
DOCS = (ROOT / "docs" / "operations" / "deploying.md").read_text()
FILLED_IN = {
    "S3_ACCESS_KEY": "potstill",
    "S3_SECRET_KEY": "s3-secret",
    "S3_READER_ACCESS_KEY": "reader",
    "S3_READER_SECRET_KEY": "reader-secret",
    "RAY_AUTH_TOKEN": "ray-token",
    "GRAFANA_PASSWORD": "grafana-password",
}

each_service = pytest.mark.parametrize("name", SERVICES)


def needs(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is missing; it is in the Debian package {package}")
    return found


def documented(table_of: str) -> set[tuple[str, ...]]:
    """The rows of the table under a heading of docs/operations/deploying.md, without what the cells say in prose."""
    section = DOCS.split(f"### {table_of}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert rows, table_of
    return {tuple(found for cell in row[:2] for found in re.findall(r"`([^`]+)`", cell)) for row in rows}


def sources_of(service: Mapping[str, Any]) -> Iterator[str]:
    for volume in service.get("volumes", ()):
        yield volume.split(":")[0]


@each_service
def test_every_image_of_others_is_named_by_version_and_digest(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].partition(":")
    assert image
    wanted = r"v?\d+\.\d+\S*@sha256:[0-9a-f]{64}"
    assert tag == "${POTSTILL_TARGET:-cpu}" if image == "potstill" else re.fullmatch(wanted, tag)


@each_service
def test_no_container_can_gain_rights_or_change_its_image(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] <= 4096
    assert service["networks"]


def test_a_trainer_meets_the_store_only_and_grafana_only_what_is_measured() -> None:
    assert SERVICES["train"]["networks"] == SERVICES["ingest"]["networks"] == ["store"]
    assert SERVICES["grafana"]["networks"] == SERVICES["prometheus"]["networks"] == ["metrics"]
    used = {network for service in SERVICES.values() for network in service["networks"]}
    assert used == set(COMPOSE["networks"])


def test_only_what_needs_a_secret_has_it() -> None:
    having = {
        variable: {name for name, service in SERVICES.items() if variable in str(service.get("environment"))}
        for variable in ("HF_TOKEN", "S3_SECRET_KEY", "RAY_AUTH_TOKEN")
    }
    assert having == {
        "HF_TOKEN": {"potstill", "ray-worker"},
        "S3_SECRET_KEY": {"potstill", "objects", "ingest", "prefill"},
        "RAY_AUTH_TOKEN": {"potstill", "ray-head", "ray-worker"},
    }


def test_the_store_reads_its_identities_as_json(tmp_path: Path) -> None:
    (script,) = SERVICES["objects"]["command"]
    path = tmp_path / "identities.json"
    script = script.replace("$$", "$").replace("/tmp/identities.json", str(path)).replace("exec weed", "true weed")
    keys = {"WRITER": "w", "WRITER_SECRET": "ws", "READER": "r", "READER_SECRET": "rs"}
    subprocess.run(["sh", "-c", script], check=True, env={"PATH": os.environ["PATH"], **keys})
    identities = {each["name"]: each for each in json.loads(path.read_text())["identities"]}
    assert identities["reader"]["credentials"] == [{"accessKey": "r", "secretKey": "rs"}]
    assert identities["reader"]["actions"] == ["Read:potstill", "List:potstill"]
    assert path.stat().st_mode & 0o77 == 0


@each_service
def test_every_service_has_limits_and_a_restart_policy_and_bounded_logs(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert service["cpus"]
    assert service["restart"] == ("no" if name in JOBS else "unless-stopped")
    assert service["logging"]["options"]["max-size"]


@each_service
def test_every_service_has_a_health_check_and_a_job_says_that_it_has_none(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    if name in JOBS:
        assert check == {"disable": True}
    else:
        assert {"test", "interval", "timeout", "retries", "start_period"} == set(check)
        assert check["test"][0] == "CMD"


@each_service
def test_a_service_waits_only_for_the_health_of_what_has_a_check(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert other not in JOBS
        assert how == {"condition": "service_healthy"}


def test_the_jobs_are_in_the_profiles() -> None:
    assert {tuple(SERVICES[job]["profiles"]) for job in JOBS} == {("prefill",), ("train",)}


def test_every_port_stands_in_the_docs() -> None:
    used = set()
    for name, service in SERVICES.items():
        used |= {(name, port.rsplit(":", 1)[-1]) for port in [*service.get("ports", ()), *service.get("expose", ())]}
    assert used == documented("Ports")


def test_every_port_but_the_service_is_published_on_loopback_only() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert port.startswith("${POTSTILL_BIND:-127.0.0.1}:" if name == "potstill" else "127.0.0.1:"), name


def test_every_volume_stands_in_the_docs_and_every_mounted_file_is_there() -> None:
    named = {source for service in SERVICES.values() for source in sources_of(service) if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"]) == {row[0] for row in documented("Volumes")}
    mounted = {source for service in SERVICES.values() for source in sources_of(service) if source.startswith(".")}
    assert all((ROOT / source).exists() for source in mounted), mounted


def test_every_variable_stands_in_the_example_and_in_the_docs() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    example = re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE)
    assert used == set(example) == {row[0] for row in documented("Variables")}


def test_no_secret_has_a_value() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    for name in (*FILLED_IN, "POTSTILL_API_KEY", "HF_TOKEN"):
        assert example[name] == ""
    for folder in ("secrets", "models", "texts"):
        assert (DEPLOY / folder / ".gitignore").read_text().splitlines()[1:] == ["*", "!.gitignore"]


def test_our_own_commands_take_the_command_lines() -> None:
    ours = {
        name: service["command"]
        for name, service in SERVICES.items()
        if service["image"].startswith("potstill:") and service.get("entrypoint") != ["ray"]
    }
    assert set(ours) == JOBS | {"potstill"}
    for command in ours.values():
        parsed(command)


def test_the_jobs_and_the_service_agree_about_the_cache_the_corpus_and_the_teacher() -> None:
    settings = settings_of(DEPLOY / "potstill.toml")
    student = TrainConfig.from_toml(DEPLOY / "student.toml")
    ingest, prefill = parsed(SERVICES["ingest"]["command"]), parsed(SERVICES["prefill"]["command"])
    assert settings.cache == ingest.cache == prefill.cache == student.data.cache
    assert ingest.corpus == prefill.corpus == student.data.corpus
    (teacher,) = settings.teachers
    assert prefill.teacher == [f"{teacher.name}=http://potstill:{settings.port}#{teacher.name}"]
    assert [source.name for source in student.teachers] == [teacher.name]
    assert ingest.tokenizer == teacher.model


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_docker_compose_itself_reads_the_files(target: str) -> None:
    program = needs("docker-compose", "docker-compose")
    files = ["-f", "docker-compose.yml"] + (["-f", "deploy/docker-compose.gpu.yml"] if target == "gpu" else [])
    filled_in = {**FILLED_IN, "POTSTILL_TARGET": target}
    done = compose(program, *files, "--profile", "prefill", "--profile", "train", "config", filled_in=filled_in)
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)["services"]
    assert set(resolved) == set(SERVICES)
    assert {one["image"] for one in resolved.values() if "potstill" in one["image"]} == {f"potstill:{target}"}
    assert ("deploy" in resolved["ray-worker"]) == (target == "gpu")


def test_docker_compose_refuses_an_empty_secret() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?set it in .env\}", text)) == set(FILLED_IN)
    program = needs("docker-compose", "docker-compose")
    done = compose(program, "config", "--quiet", filled_in={**FILLED_IN, "RAY_AUTH_TOKEN": ""})
    assert done.returncode == 1
    assert "set it in .env" in done.stderr


def compose(program: str, *arguments: str, filled_in: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **filled_in},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_images_install_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = re.findall(r"uv pip install -r pyproject.toml(.*)", DOCKERFILE)
    engines = [re.findall(r"--extra (\S+)", install) for install in installs]
    assert engines == [["teacher-cpu", "trainer", "fast"], ["teacher", "trainer", "fast"]]
    assert {name for names in engines for name in names} <= set(extras)


def test_the_images_have_the_packages_of_the_wheel_and_nothing_is_copied_that_is_left_out() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
        if not source.startswith("--")
    }
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= copied
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_the_cpu_image_has_the_versions_that_our_tests_run_with() -> None:
    pins = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    (torch,) = re.findall(r"--torch-backend cpu (torch==\S+)", DOCKERFILE)
    assert f"{torch}+cpu" in pins
    assert "-c requirements/cpu.txt" in DOCKERFILE


def test_the_images_are_pinned_run_as_nobody_special_and_stop_on_a_signal() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.MULTILINE)
    names = {name for _, name in stages}
    assert {"cpu", "gpu"} <= names
    assert {image for image, _ in stages} - names == {
        "python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84"
    }
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE)[-1] == "10001:10001"
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE
    assert re.findall(r"^ENTRYPOINT (.*)", DOCKERFILE, re.MULTILINE) == ['["potstill"]']
    (command,) = re.findall(r"^CMD (.*)", DOCKERFILE, re.MULTILINE)
    parsed(yaml.safe_load(command))


def test_the_health_checks_ask_a_real_service() -> None:
    (image_check,) = re.findall(r"HEALTHCHECK .*CMD (\[.*\])", DOCKERFILE)
    with serving_teachers(hosted("big", FakeTeacher())) as url:
        port = url.rsplit(":", 1)[1]
        checks = [yaml.safe_load(image_check), SERVICES["potstill"]["healthcheck"]["test"][1:]]
        assert [health(check, port) for check in checks] == [0, 0]
    assert [health(check, port) for check in checks] == [1, 1]


def health(check: list[str], port: str) -> int:
    """The exit status of a check's command, asked of the service on a port."""
    assert check[:2] == ["python", "-c"]
    code = check[2].replace(":8700/", f":{port}/")
    done = subprocess.run(
        [sys.executable, "-c", code], env={"POTSTILL_PORT": port}, capture_output=True, text=True, check=False
    )
    return done.returncode


def test_the_alerts_are_about_metrics_that_a_service_has() -> None:

    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    with serving_teachers(hosted("big", FakeTeacher())) as url:
        text = http.get(f"{url}/metrics").text
    families = {line.split()[2].removesuffix("_total") for line in text.splitlines() if line.startswith("# TYPE")}
    for rule in rules:
        for name in re.findall(r"potstill_\w+", rule["expr"]):
            assert re.sub(r"_(total|bucket)$", "", name) in families, name
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]


def test_promtool_takes_the_settings_and_the_rules() -> None:
    program = needs("promtool", "prometheus")
    done = subprocess.run(
        [program, "check", "config", DEPLOY / "prometheus.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


def test_prometheus_scrapes_ports_that_are_there() -> None:
    scrapes = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scrapes for group in job.get("static_configs", ()) for target in group["targets"]}
    targets |= {
        f"{name}:{dns['port']}" for job in scrapes for dns in job.get("dns_sd_configs", ()) for name in dns["names"]
    }
    assert {tuple(target.split(":")) for target in targets} <= documented("Ports")


def test_the_settings_of_compose_bound_each_client_and_say_how_not_to_behind_a_proxy(tmp_path: Path) -> None:
    text = (DEPLOY / "potstill.toml").read_text()
    assert settings_of(DEPLOY / "potstill.toml").limits.max_connections_per_address > 0
    behind = tmp_path / "potstill.toml"
    behind.write_text(re.sub(r"^# (\[limits\]|max_connections_per_address\b)", r"\1", text, flags=re.MULTILINE))
    assert settings_of(behind).limits.max_connections_per_address == 0


def test_the_unit_starts_a_command_that_parses() -> None:
    unit = (DEPLOY / "systemd" / "potstill.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *arguments = start.split()
    assert program.endswith("/potstill")
    parsed(arguments)
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) > ServiceSettings.model_fields["grace_seconds"].default


def test_the_script_that_joins_ray_is_a_script() -> None:
    script = DEPLOY / "on-ray"
    assert os.access(script, os.X_OK)
    done = subprocess.run(
        ["sh", script, "true"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "RAY_HEAD" in done.stderr
