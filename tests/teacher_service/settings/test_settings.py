from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.cache.errors import InvalidInput
from potstill.teacher_service.hosting.teacher_source import TeacherSource
from potstill.teacher_service.settings.replicas import RaySettings
from potstill.teacher_service.settings.service import (
    AccessSettings,
    LimitSettings,
    ServiceSettings,
    TeacherSettings,
    TlsSettings,
    load_settings,
)

SMOL = [{"name": "smol", "model": "some/model"}]
FULL = """
host = "localhost"
port = 9000
cache = "kept"
grace_seconds = 5

[keep]
k = 32
encoding = "f16"

[limits]
max_rows = 7

[[teachers]]
name = "smol"
model = "some/model"
options = { dtype = "float32", max_top_k = 128, nested = { a = [1, 2] } }

[[teachers]]
name = "far"
model = "http://127.0.0.1:1#smol"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return path

    return write


def load(
    config: Path | None = None, environment: Mapping[str, str] | None = None, **command_line: Any
) -> ServiceSettings:
    return load_settings(config, command_line=command_line, environment=environment or {})


def test_defaults() -> None:
    settings = load(teachers=SMOL)
    assert (settings.host, settings.port, settings.cache) == ("127.0.0.1", 8700, None)
    assert (settings.keep.k, settings.keep.encoding) == (64, "u8")
    assert settings.teachers[0].options == {}


def test_a_full_file(toml: Callable[[str], Path]) -> None:
    settings = load(toml(FULL))
    assert (settings.host, settings.port, settings.cache, settings.grace_seconds) == (
        "localhost",
        9000,
        "kept",
        5,
    )
    assert (settings.keep.k, settings.keep.encoding, settings.limits.max_rows) == (32, "f16", 7)
    assert [teacher.name for teacher in settings.teachers] == ["smol", "far"]
    assert settings.teachers[0].options == {"dtype": "float32", "max_top_k": 128, "nested": {"a": [1, 2]}}


def test_replicas_and_ray(toml: Callable[[str], Path]) -> None:
    settings = load(
        toml("""
        [ray]
        address = "local"

        [[teachers]]
        name = "big"
        model = "some/model"
        replicas = 2
        max_replicas = 3
        resources = { cpus = 4, gpus = 2, custom = { a100 = 1 } }

        [[teachers]]
        name = "small"
        model = "some/model"
        autoscale = { min = 1, max = 4, tokens_per_replica = 20_000 }
        """)
    )
    assert settings.ray is not None
    assert settings.ray.address == "local"
    big, small = settings.teachers
    assert (big.replicas, big.max_replicas, big.resources.gpus, big.resources.custom) == (2, 3, 2, {"a100": 1})
    assert small.autoscale is not None
    assert (small.autoscale.max, small.autoscale.down_seconds) == (4, 120.0)
    assert load(teachers=SMOL).ray is None


@pytest.mark.parametrize(
    ("ray", "teacher", "reason"),
    [
        (False, {"model": "m", "replicas": 2}, "which need Ray"),
        (False, {"model": "m", "autoscale": {"max": 2, "tokens_per_replica": 9}}, "which need Ray"),
        (True, {"model": "http://elsewhere#m", "replicas": 2}, "one of another service"),
    ],
)
def test_replicas_that_cannot_be_are_refused_before_anything_starts(
    ray: bool, teacher: dict[str, Any], reason: str
) -> None:
    source = TeacherSource(ray=RaySettings() if ray else None)
    with pytest.raises(InvalidInput, match=reason):
        source.host(TeacherSettings.model_validate({"name": "smol", **teacher}))


def test_the_command_line_wins_over_the_environment_over_the_file(toml: Callable[[str], Path]) -> None:
    path = toml(FULL)
    environment = {"POTSTILL_PORT": "9001", "POTSTILL_CACHE": "from-environment", "PATH": "/bin"}
    settings = load(path, environment, port=9002, host=None, cache=None)
    assert (settings.port, settings.cache, settings.host) == (9002, "from-environment", "localhost")
    assert load(path, environment).port == 9001
    assert [teacher.name for teacher in load(path, teachers=SMOL).teachers] == ["smol"]


def test_settings_are_frozen() -> None:
    settings = load(teachers=SMOL)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.teachers[0].name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", ["serve.toml", "unknown key prot", "known are host, port, cache"]),
        ("[limits]\nmax_rowz = 1", ["serve.toml", "limits.max_rowz", "max_rows"]),
        ("[keep]\nbits = 8", ["keep.bits", "known are k, encoding"]),
        ("port = 70000", ["serve.toml", "port is 70000"]),
        ('port = "x"', ["port is 'x'"]),
        ("[keep]\nk = 0", ["keep.k is 0"]),
        ("[keep]\nk = true", ["keep.k is True"]),
        ('[keep]\nencoding = "u4"', ["keep.encoding is 'u4'", "'u8'"]),
        ("[limits]\nmax_rows = 1.5", ["limits.max_rows is 1.5"]),
        ("keep = 3", ["keep is 3"]),
        ("cache = ''", ["cache is ''"]),
        ("[ray]\nadress = 'auto'", ["unknown key ray.adress; known are address, app_prefix"]),
        ("[ray]\nwedged_seconds = 0", ["ray.wedged_seconds is 0"]),
        ("= 1", ["serve.toml", "not TOML"]),
        ("port = 1\nport = 2", ["serve.toml", "not TOML"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(toml: Callable[[str], Path], text: str, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(toml(text), teachers=SMOL)
    assert "\n" not in caught.value.detail
    for word in words:
        assert word in caught.value.detail


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ('[[teachers]]\nname = "a"', ["teachers.0.model"]),
        ('[[teachers]]\nname = "a"\nmodel = ""', ["teachers.0.model is ''"]),
        (
            '[[teachers]]\nname = "a"\nmodel = "m"\noption = 1',
            ["teachers.0.option", "name, model, options"],
        ),
        ('[[teachers]]\nname = "a"\nmodel = "m"\n' * 2, ["two teachers are called 'a'"]),
        ("teachers = []", ["--teacher NAME=MODEL"]),
        ("", ["--teacher NAME=MODEL"]),
        ('[[teachers]]\nname = "a"\nmodel = "m"\nreplicas = 9', ["replicas is 9, over max_replicas=8"]),
        (
            '[[teachers]]\nname = "a"\nmodel = "m"\nautoscale = { max = 2, tokens_per_replica = 9, up = 1 }',
            ["unknown key teachers.0.autoscale.up; known are min, max, tokens_per_replica"],
        ),
        (
            '[[teachers]]\nname = "a"\nmodel = "m"\nresources = { gpu = 1 }',
            ["unknown key teachers.0.resources.gpu; known are cpus, gpus, custom"],
        ),
        ('teachers = "a"', ["teachers is 'a'"]),
    ],
)
def test_bad_teachers_in_a_file(toml: Callable[[str], Path], teachers: str, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(toml(teachers))
    for word in words:
        assert word in caught.value.detail


@pytest.mark.parametrize("name", ["a", "smol-135M_v1.0", "0", "x" * 64])
def test_good_names(name: str) -> None:
    assert load(teachers=[{"name": name, "model": "m"}]).teachers[0].name == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "a b", "a/b", "a\n", "ä", "x" * 65, "a#b"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidInput, match="command line: teachers.0.name is"):
        load(teachers=[{"name": name, "model": "m"}])


def test_an_unknown_variable_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="POTSTILL_PROT; known are POTSTILL_HOST, POTSTILL_PORT, POTSTILL_CACHE"):
        load(environment={"POTSTILL_PROT": "1"}, teachers=SMOL)


def test_the_key_of_the_clients_is_no_setting_and_no_mistake() -> None:
    assert load(environment={"POTSTILL_API_KEY": "k"}, teachers=SMOL) == load(teachers=SMOL)


def test_access_and_tls(toml: Callable[[str], Path]) -> None:
    text = """
    [access]
    keys_file = "keys.toml"
    audit_file = "audit.jsonl"
    open_metrics = true
    [tls]
    certfile = "cert.pem"
    keyfile = "key.pem"
    """
    settings = load(toml(text), teachers=SMOL)
    assert settings.access == AccessSettings(keys_file="keys.toml", audit_file="audit.jsonl", open_metrics=True)
    assert settings.tls == TlsSettings(certfile="cert.pem", keyfile="key.pem")
    assert (load(teachers=SMOL).access.keys_file, load(teachers=SMOL).tls) == (None, None)
    for bad, words in (
        ('[tls]\ncertfile = "c"', "tls.keyfile"),
        ("[access]\nkeys = 1", "known are keys_file"),
        ("[limits]\nbody_seconds = 0", "limits.body_seconds is 0"),
    ):
        with pytest.raises(InvalidInput, match=words):
            load(toml(bad), teachers=SMOL)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("max_answer_bytes = 30\nmax_answer_bytes_in_flight = 20", ["max_answer_bytes=30", "_in_flight=20, which"]),
        (
            "max_answer_bytes = 30\nmax_miss_bytes_in_flight = 20",
            ["max_answer_bytes=30", "max_miss_bytes_in_flight=20"],
        ),
        ("max_body_bytes = 30\nmax_body_bytes_in_flight = 20", ["max_body_bytes=30", "max_body_bytes_in_flight=20"]),
    ],
)
def test_what_one_may_have_and_all_together_may_not_is_refused_at_the_start(
    toml: Callable[[str], Path], limits: str, words: list[str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(toml(f"[limits]\n{limits}"), teachers=SMOL)
    detail = caught.value.detail
    assert "serve.toml: limits: max_" in detail
    assert "to at most 20, or raise" in detail
    for word in words:
        assert word in detail


def test_bounds_of_all_together_that_are_not_given_have_room_for_the_largest_of_one(
    toml: Callable[[str], Path],
) -> None:
    limits = load(toml("[limits]\nmax_answer_bytes = 3_000_000_000"), teachers=SMOL).limits
    assert (limits.max_answer_bytes_in_flight, limits.max_miss_bytes_in_flight) == (3_000_000_000, 3_000_000_000)
    assert limits.max_body_bytes_in_flight == LimitSettings().max_body_bytes_in_flight
    assert load(toml("[limits]\nmax_answer_bytes = 5"), teachers=SMOL).limits.max_miss_bytes_in_flight == 2**30
    lowered = load(toml("[limits]\nmax_miss_bytes_in_flight = 20"), teachers=SMOL).limits
    assert (lowered.max_miss_bytes_in_flight, lowered.max_answer_bytes) == (20, LimitSettings().max_answer_bytes)


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"POTSTILL_PORT: port is 'x'"):
        load(environment={"POTSTILL_PORT": "x"}, teachers=SMOL)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"there is no file .*nowhere.toml'$"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"binary.toml: is not UTF-8"):
        load(tmp_path / "binary.toml")
