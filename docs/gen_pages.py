"""The pages of the reference that are made of the code itself when the site is built: a hook of MkDocs.

`on_files` adds a page for each entry of `PAGES`, whose function gives its markdown.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields as dataclass_fields
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from potstill.cache.entry_points import command_entry_points
from potstill.cache.errors import PotstillError
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.config import TrainConfig
from potstill.teacher_service.app import create_app
from potstill.teacher_service.engine.vllm_teacher import VllmOptions
from potstill.teacher_service.hosting.service import Service
from potstill.teacher_service.settings.service import ServiceSettings

ROOT = Path(__file__).resolve().parents[1]
_HELP_COLUMNS = "88"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every decision in the navigation."""
    architecture = next(part["Architecture"] for part in config.nav or () if "Architecture" in part)
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    architecture[-1]["Decisions"] = [f"decisions/{path.name}" for path in decisions]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for uri, page in PAGES.items():
        files.append(File.generated(config, uri, content=page()))
    return files


def http_page() -> str:
    """Every route of the OpenAPI document, as a service without teachers gives it."""
    document = create_app(Service([])).openapi()
    lines = ["# HTTP", "", _HTTP_HEAD]
    for path, operations in document["paths"].items():
        for method, about in operations.items():
            assert "description" in about, f"{method} {path}: its function has no docstring"
            lines += [
                f"## {method.upper()} `{path}`",
                "",
                f"{about['description']}\n",
                *_parameters(about),
                *_bodies(about, document),
            ]
    return "\n".join(lines)


_HTTP_HEAD = """\
A running service describes itself at `/openapi.json`; this page is made of that document. Every error is
`{"kind": ..., "detail": ...}` with the status that [Errors](errors.md) names, but under
`/v1/completions`, where it has OpenAI's shape. With API keys, send `Authorization: Bearer KEY`; see
[Keys, quotas, TLS](../guide/access.md).
"""


def _parameters(about: dict[str, Any]) -> Iterator[str]:
    found = about.get("parameters", ())
    if found:
        yield "| parameter | in | type | |\n|---|---|---|---|"
    for one in found:
        schema = one.get("schema", {})
        default = f"default `{schema['default']}`" if schema.get("default") is not None else ""
        yield f"| `{one['name']}` | {one['in']} | {_type(schema)} | {'required' if one.get('required') else default} |"
    yield ""


def _bodies(about: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    for media_type, content in about.get("requestBody", {}).get("content", {}).items():
        keys = list(_keys(content.get("schema", {}), document))
        yield f"Body, `{media_type}`{':' if keys else ''}\n"
        if keys:
            yield "| key | type | |\n|---|---|---|"
        yield from keys
        yield ""


def _keys(schema: dict[str, Any], document: dict[str, Any], inside: str = "") -> Iterator[str]:
    """A row for each key of an object, then those of the objects in it."""
    schema = next((one for one in schema.get("anyOf", ()) if "$ref" in one), schema)
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for name, value in schema.get("properties", {}).items():
        default = f"default `{json.dumps(value['default'])}`" if value.get("default") not in (None, {}, []) else ""
        note = "required" if name in schema.get("required", ()) else default
        yield f"| `{inside}{name}` | {_type(value)} | {note} |"
        yield from _keys(value, document, f"{inside}{name}.")


def commands_page() -> str:
    """The help of every command, by its parser."""
    os.environ["COLUMNS"] = _HELP_COLUMNS
    lines = ["# Commands", "", _COMMANDS_HEAD]
    for name, point in command_entry_points().items():
        command = point.load()
        parser = argparse.ArgumentParser(prog=f"potstill {name}", allow_abbrev=False)
        command.add_arguments(parser)
        lines += [f"## potstill {name}", "", f"{_sentence(command.SUMMARY)}\n", *_help(parser)]
    return "\n".join(lines)


_COMMANDS_HEAD = """\
`potstill COMMAND --help` prints the same. Exit status: 0 done, 1 an error (one line `kind: detail` on stderr; see
[Errors](errors.md)), 2 wrong usage, 130 Ctrl-C.
"""


def _help(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"```text\n{parser.format_help().rstrip()}\n```\n"
    for action in parser._actions:  # noqa: SLF001  argparse has no other way to its subparsers
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for name, one in action.choices.items():
                yield f"### {parser.prog} {name}\n\n```text\n{one.format_help().rstrip()}\n```\n"


def service_settings_page() -> str:
    """The settings of `potstill serve`."""
    return _settings_page("Settings of a service", _SERVICE_HEAD, ServiceSettings)


def training_settings_page() -> str:
    """The settings of `potstill train`."""
    return _settings_page("Settings of a training run", _TRAINING_HEAD, TrainConfig)


def ablation_settings_page() -> str:
    """The settings of `potstill ablate`."""
    return _settings_page("Settings of an ablation", _ABLATION_HEAD, GridConfig)


_SERVICE_HEAD = """\
`potstill serve CONFIG.toml` reads these keys. An option of the command line wins over an environment variable
(`POTSTILL_HOST`, `POTSTILL_PORT`, `POTSTILL_CACHE`), and that over the file. An unknown key is an error.
"""
_TRAINING_HEAD = """\
`potstill train CONFIG.toml` reads these keys. Relative paths are taken from the current folder. An unknown key is an
error.
"""


_ABLATION_HEAD = """\
`potstill ablate GRID.toml` reads these keys; [Ablations](../guide/ablating.md) shows a file. An unknown key is
an error.
"""


def _settings_page(title: str, head: str, model: type[BaseModel]) -> str:
    return "\n".join([f"# {title}", "", head, *_tables(model, "", "")])


def _tables(model: type[BaseModel], table: str, brackets: str) -> Iterator[str]:
    """The table of a model's own keys, then those of the models inside it."""
    heading = f"`{brackets}{table}{brackets.replace('[', ']')}`" if table else "Top level"
    yield f"## {heading}\n\n{inspect.getdoc(model) or ''}\n"
    yield "| key | | default | allowed |\n|---|---|---|---|"
    notes = _notes(model)
    schema = model.model_json_schema()
    inner: list[tuple[type[BaseModel], str, str]] = []
    for name, field in model.model_fields.items():
        found = _model_in(field.annotation)
        if found is None:
            required = field.default is PydanticUndefined and field.default_factory is None
            default = "required" if required else _toml(field.get_default(call_default_factory=True))
            yield f"| `{name}` | {notes.get(name, '')} | {default} | {_type(schema['properties'][name])} |"
        else:
            several = "tuple" in str(field.annotation)
            inner.append((found, f"{table}.{name}".lstrip("."), "[[" if several else "["))
    yield ""
    for found, name, around in inner:
        yield from _tables(found, name, around)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)


def _notes(cls: type) -> dict[str, str]:
    """Docstrings below the attributes of a class and of its bases, each on one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("potstill."):
            members = griffe.visit(
                base.__module__, Path(inspect.getfile(base)), inspect.getsource(inspect.getmodule(base))
            )
            for name, member in members[base.__name__].members.items():
                if member.docstring is not None:
                    found[name] = _cell(member.docstring.value)
    return found


def _toml(value: Any) -> str:
    """A default, as a file would have it."""
    match value:
        case None:
            return "none"
        case bool():
            shown = str(value).lower()
        case int() if value >= _LONG_NUMBER:
            shown = f"{value:_}"
        case str():
            shown = f'"{value}"'
        case tuple():
            shown = str(list(value))
        case _:
            shown = str(value)
    return f"`{shown}`"


_LONG_NUMBER = 10_000
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_HUGE = 2**53
_WORDS = {"integer": "whole number", "string": "text", "object": "table", "array": "list", "boolean": "true or false"}


def _type(schema: dict[str, Any]) -> str:
    """Values that a JSON schema allows, in words."""
    if "anyOf" in schema or "oneOf" in schema:
        parts = [_type(one) for one in schema.get("anyOf", schema.get("oneOf")) if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "object")
    kinds = [one for one in (kind if isinstance(kind, list) else [kind]) if one != "null"]
    bounds = [f"{sign} {schema[key]:,g}" for key, sign in _BOUNDS.items() if key in schema and schema[key] < _HUGE]
    if {"minimum", "maximum"} <= schema.keys() and schema["maximum"] < _HUGE:
        bounds = [f"{schema['minimum']:,g} to {schema['maximum']:,g}"]
    inside = f" of {_type(schema['items'])}" if "items" in schema else ""
    return " ".join([" or ".join(_WORDS.get(one, one) for one in kinds) + inside, ", ".join(bounds)]).strip()


def teacher_options_page() -> str:
    """The options of a vLLM teacher and of one behind a service."""
    notes = _notes(VllmOptions)
    lines = ["# Options of a teacher", "", _OPTIONS_HEAD, "| option | | default |", "|---|---|---|"]
    for field in dataclass_fields(VllmOptions):
        if field.name != "model":
            shown = "required" if field.default is MISSING else _toml(field.default)
            lines.append(f"| `{field.name}` | {notes.get(field.name, '')} | {shown} |")
    return "\n".join(lines)


_OPTIONS_HEAD = """\
`options` of a `[[teachers]]` table of [a service](service-settings.md), for a teacher that vLLM runs. Which of them are
part of a teacher's identity is told in [Targets](../guide/targets.md#who-a-teacher-is).
"""


def errors_page() -> str:
    """The tree of errors."""
    lines = ["# Errors", "", _ERRORS_HEAD, "| class | | `kind` | status | try again |", "|---|---|---|---|---|"]
    for depth, cls in _tree(PotstillError, 0):
        name = f"{'&nbsp;' * 4 * depth}`{cls.__name__}`"
        retry = "yes" if cls.retryable else ""
        lines.append(f"| {name} | {_cell(cls.__doc__ or '')} | `{cls.kind}` | {cls.status} | {retry} |")
    return "\n".join(lines)


_ERRORS_HEAD = """\
There is one tree of errors, in `potstill.cache.errors`. Each class has a stable `kind`, one HTTP status, and says
whether the same call may be tried again. A service answers `{"kind": ..., "detail": ...}`; its clients raise the class
that the kind names; a command prints `kind: detail` as one line and exits with status 1. A cache miss is no error.
Clients try again what may be tried again, as `Retry-After` says, until the call's own time is over.
"""


def _tree(root: type[PotstillError], depth: int) -> Iterator[tuple[int, type[PotstillError]]]:
    yield depth, root
    for child in root.__subclasses__():
        yield from _tree(child, depth + 1)


def format_page() -> str:
    """The definition of the format, which stands beside the code that keeps to it."""
    return (ROOT / "cache" / "FORMAT.md").read_text(encoding="utf-8")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {
    "reference/http.md": http_page,
    "reference/commands.md": commands_page,
    "reference/service-settings.md": service_settings_page,
    "reference/training-settings.md": training_settings_page,
    "reference/ablation-settings.md": ablation_settings_page,
    "reference/teacher-options.md": teacher_options_page,
    "reference/errors.md": errors_page,
    "reference/format.md": format_page,
}
