"""Settings of `potstill serve`: built once from the command line, the environment and one TOML file.

Precedence: command line, then environment, then file, then default. A value is taken whole from the
first that has it: one `--teacher` replaces the file's list of teachers. The result is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from potstill.cache.errors import InvalidInput
from potstill.cache.named_files import read_toml
from potstill.teacher_service.settings.replicas import Count, FrozenSettings, RaySettings, ReplicaSettings

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ENVIRONMENT = {"POTSTILL_HOST": "host", "POTSTILL_PORT": "port", "POTSTILL_CACHE": "cache"}
"""Every environment variable the service reads, and the setting it sets."""
_KEYS = "POTSTILL_API_KEY"  # begins the names of variables that are read by teachers that are other services

_OF_ONE_AND_ALL = (
    ("max_body_bytes", "max_body_bytes_in_flight"),
    ("max_answer_bytes", "max_answer_bytes_in_flight"),
    ("max_answer_bytes", "max_miss_bytes_in_flight"),
)
"""Bounds of one request, each with the bound of all together that must have room for it."""


class KeepSettings(FrozenSettings):
    """The part of the answers to score requests that the cache keeps."""

    k: Count = 64
    """Kept entries per position; a request for more goes to the teacher and is not kept."""
    encoding: Literal["u8", "f16", "f32"] = "u8"
    """Encoding of the kept answers. Fresh answers go through it, too, so that a miss and a later hit are the same."""
    journal_quota_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """GiB of each teacher's answers that belong to no corpus; beyond it the oldest are removed. 0 keeps none from now
    on, and removes none: `potstill delete ROOT --teacher NAME --journal` does."""


class LimitSettings(FrozenSettings):
    """Bounds of one request, and of all requests together. Beyond them: `LimitExceeded` or `Overloaded`.

    A bound of all together that is not given is raised to the bound of one request, when that is larger.
    """

    max_body_bytes: Count = 8 * 2**20
    """Bytes of one request's body; the default holds twice the default `max_tokens_in_flight` even as JSON."""
    max_answer_bytes: Count = 512 * 2**20
    """Bytes of one answer's arrays, computed from tokens, K and fields before any work is done."""
    max_rows: Count = 4096
    """Rows per request."""
    max_range_positions: Count = 65_536
    """Positions per read of a corpus' targets as JSON, whose arrays are held until it is sent."""
    max_stream_positions: Count = 16_777_216
    """Positions per read of a corpus' targets as an Arrow stream, which neither end holds as a whole."""
    max_streams: Count = 64
    """Answers of corpora that are being sent, JSON ones too. What they hold, for an Arrow stream about three blocks of
    4 MiB, counts in `max_answer_bytes_in_flight`."""
    stall_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds that a client may take nothing of a stream before it is broken off."""
    max_tokens_in_flight: Count = 262_144
    """Tokens that wait for one teacher's engine or are in it; also the most of one request."""
    max_engine_tokens: Count = 16_384
    """Tokens inside one replica's engine; others wait in a queue that is fair between keys. A few steps' worth keeps an
    engine busy; with more inside, fewer are left for the queue to be fair with."""
    max_engine_bytes: Count = 2 * 2**30
    """Bytes that the tokens inside a teacher's engine may need until answered, see `engine_bytes_per_token`."""
    max_requests_in_flight: Count = 256
    """Score requests that are being read or looked up; those that wait for an engine are bounded by tokens instead."""
    max_body_bytes_in_flight: Count = 256 * 2**20
    """Bytes of all request bodies that are held."""
    max_answer_bytes_in_flight: Count = 2**30
    """Bytes of all score answers that are looked up or come from the cache, until they are sent, of what answers of
    corpora hold, and of any other answer over 64 KiB; those of arrays are computed as for `max_answer_bytes`. Each fill
    may hold as much, see `max_fills_running`."""
    max_miss_bytes_in_flight: Count = 2**30
    """Bytes of all score answers with rows that wait for an engine, from then on until they are sent. Counted apart, so
    that no hit is refused because misses queue; all score answers hold at most the two bounds together."""
    body_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds within which a request's head, then its body, must arrive, and each 256 KiB of an answer be taken."""
    max_connections: Count = 768
    """Open connections, also idle ones and those that have not agreed on TLS yet, for which they have five seconds.
    The service may open 256 files besides: it raises its own limit where it must, or says that it cannot."""
    max_connections_per_address: Annotated[int, Field(ge=0, strict=True)] = 512
    """Open connections of one client's address (of IPv6 its /64 network), so that one cannot take all; 0 is no bound.
    Behind a proxy all clients come from the proxy's address: set 0 there, and bound them in the proxy."""
    max_fills_running: Count = 2
    """Jobs that fill corpora at one time; further ones wait in the order in which they came. Each holds the targets of
    its batches, at most `max_answer_bytes_in_flight`, and of the shards that it gathers and writes. While a teacher
    tells one to come back later another may begin: up to twice as many in all, and beyond that the first of each
    key."""

    def smallest(self, *names: str) -> tuple[str, int]:
        """The name and value of the smallest of these bounds."""
        name = min(names, key=lambda each: int(getattr(self, each)))
        return name, int(getattr(self, name))

    @model_validator(mode="before")
    @classmethod
    def _make_room(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        made = dict(given)
        for one, together in _OF_ONE_AND_ALL:
            most = given.get(one)
            if isinstance(most, int) and together not in given:  # other types are refused by the field itself
                made[together] = max(most, cls.model_fields[together].default)
        return made

    @model_validator(mode="after")
    def _one_fits_among_all(self) -> Self:
        for one, together in _OF_ONE_AND_ALL:
            most, room = getattr(self, one), getattr(self, together)
            # Only a bound of one that was set is a promise: its default simply shrinks with a lowered bound of all.
            if one in self.model_fields_set and most > room:
                raise ValueError(
                    f"{one}={most} is over {together}={room}, which would refuse what is in between for ever; "
                    f"lower {one} to at most {room}, or raise {together}"
                )
        return self


class AccessSettings(FrozenSettings):
    """API keys and the audit log. Without keys everybody may do everything, and the service binds to loopback only."""

    keys_file: Annotated[str, StringConstraints(min_length=1)] | None = None
    """File of API keys, as `potstill keys` writes it; read again when it changes and on SIGHUP."""
    audit_file: Annotated[str, StringConstraints(min_length=1)] | None = None
    """File to which a JSON line is added for each admin action; without it they go to the log `potstill.audit`."""
    hosts: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]+$")], ...] = ()
    """Names under which the service may be called (`Host` without the port), beside `localhost` and loopback addresses.
    Without keys others are refused, so that no web page can use the service; with keys any name is right if none is
    given."""
    open_metrics: bool = False
    """True answers `/metrics` without a key."""


class TlsSettings(FrozenSettings):
    """PEM files of the certificate chain and its private key."""

    certfile: Annotated[str, StringConstraints(min_length=1)]
    keyfile: Annotated[str, StringConstraints(min_length=1)]


def _http_url(text: str) -> str:
    if not re.match(r"https?://[^/\s]", text):
        raise ValueError("write an address like http://collector:4318/v1/traces")
    return text


class LogSettings(FrozenSettings):
    """The log, which goes to stderr."""

    format: Literal["text", "json"] = "text"
    """Form of the lines; `json` is one object a line, for machines that collect logs."""
    level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least level that is logged. `info` has a line per request, but good answers to probes are only in `debug`."""


class TracingSettings(FrozenSettings):
    """Spans for OpenTelemetry; needs the extra `otel`."""

    endpoint: Annotated[str, AfterValidator(_http_url)] | None = None
    """URL of OTLP over HTTP, like `http://collector:4318/v1/traces`; without it nothing is traced."""


class TeacherSettings(ReplicaSettings):
    """One teacher: the name it is served under, where it comes from, and how many replicas it has."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of 1 to 64 letters, digits, '.', '_' or '-'; in the cache it stands for one model."""
    model: Annotated[str, StringConstraints(min_length=1)]
    """A model name or path for vLLM, or the URL of another service."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Options of the teacher, like `dtype`; its factory checks them. A service that asks for a key gets that of the
    variable that `api_key_env` names, like `POTSTILL_API_KEY`, and else none."""

    @property
    def remote(self) -> bool:
        """True where another service runs the teacher, so that it has no engine and no replicas of ours."""
        return self.model.startswith(("http://", "https://"))

    @property
    def factory_options(self) -> dict[str, JsonValue]:
        """Options as the factory gets them. The service's own key is shown to no URL whose options do not name it."""
        return {"api_key": "", **self.options} if self.remote else self.options

    def check_replicas(self, *, ray: bool) -> None:
        """Refuse several replicas where there can be only one.

        Raises:
            InvalidInput: several without Ray, or of a teacher that another service runs.
        """
        if self.replicas == 1 and self.autoscale is None:
            return
        if not ray:
            raise InvalidInput(f"teacher {self.name!r} asks for several replicas, which need Ray: add the table [ray]")
        if self.remote:
            raise InvalidInput(f"teacher {self.name!r} is one of another service; it is that one which has replicas")


class ServiceSettings(FrozenSettings):
    """All settings of `potstill serve`."""

    host: Annotated[str, StringConstraints(min_length=1)] = "127.0.0.1"
    """Address to listen on; others than loopback need API keys."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8700
    """Port to listen on; 0 takes a free one, which the ready line names."""
    cache: Annotated[str, StringConstraints(min_length=1)] | None = None
    """Folder or URL of the cache root; without it nothing is kept."""
    grace_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    """Seconds that a stopping service waits for the requests in flight."""
    keep: KeepSettings = KeepSettings()
    limits: LimitSettings = LimitSettings()
    access: AccessSettings = AccessSettings()
    tls: TlsSettings | None = None
    logs: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    ray: RaySettings | None = None
    """Settings of Ray. With this table teachers are Ray Serve deployments; without it each is an engine in process."""
    teachers: Annotated[tuple[TeacherSettings, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"two teachers are called {doubled!r}; every teacher needs its own name")
        return self


def load_settings(
    config: Path | None, *, command_line: Mapping[str, Any], environment: Mapping[str, str]
) -> ServiceSettings:
    """Merge the three sources and check the result.

    `command_line` holds settings by name; `None` means that the option was not given.

    Raises:
        InvalidInput: a file that cannot be read, an unknown key or variable, a bad value. The message is
            one line that names the source, the key and what is allowed.
    """
    given = {key: value for key, value in command_line.items() if value is not None}
    from_environment = _from_environment(environment)
    from_file = {} if config is None else read_toml(config)
    merged = {**from_file, **from_environment, **given}
    if not merged.get("teachers"):
        raise InvalidInput("no teacher to serve; give --teacher NAME=MODEL or [[teachers]] in the TOML file")
    try:
        return ServiceSettings.model_validate(merged)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else "teachers"
        variable = next((name for name, setting in ENVIRONMENT.items() if setting == key), key)
        source = "command line" if key in given else variable if key in from_environment else str(config)
        raise InvalidInput(f"{source}: {_explain(error)}") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    ours = {name for name in environment if name.startswith("POTSTILL_") and not name.startswith(_KEYS)}
    unknown = sorted(ours - ENVIRONMENT.keys())
    if unknown:
        raise InvalidInput(f"unknown environment variable {unknown[0]}; known are {', '.join(ENVIRONMENT)}")
    return {key: environment[name] for name, key in ENVIRONMENT.items() if name in environment}


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}; known are {', '.join(_known_keys(first['loc'][:-1]))}"
    if first["type"] == "string_pattern_mismatch":
        return f"{where} is {first['input']!r}; a name is 1 to 64 letters, digits, '.', '_' or '-'"
    message = re.sub(r"^Value error, ", "", first["msg"])
    if isinstance(first["input"], dict):  # a whole table, of which the message names what is wrong
        return f"{where}: {message}" if where else message
    return f"{where} is {first['input']!r}: {message}" if where else message


def _known_keys(table: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = ServiceSettings
    for name in table:
        if isinstance(name, str):  # a number is a place in a list of tables
            annotation = model.model_fields[name].annotation
            kinds = (annotation, *get_args(annotation))
            model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
