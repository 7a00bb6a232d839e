from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from potstill.cache.entry_points import command_entry_points
from potstill.clients import cli
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers

COMMAND = [sys.executable, "-m", "potstill.clients.cli"]


def potstill(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POTSTILL_")}
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, **options},
        check=False,
    )


def inside(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported what takes long to import."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: int | str | None = cli.main(arguments)
        except SystemExit as wrong:
            status = wrong.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture
def url() -> Iterator[str]:
    with serving_teachers(hosted("smol", FakeTeacher()), hosted("large", FakeTeacher())) as address:
        yield address


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path whose entry points are two real command modules and one that cannot be loaded."""
    info = tmp_path / "extra-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[potstill.commands]\nshout = shout\nlacking = lacking\nfailing = failing\nsleepy = sleepy\ntorn = torn\n"
    )
    command = "SUMMARY = 'says {0}'\ndef add_arguments(parser):\n    parser.add_argument('--n', type=int, default=1)\n"
    (tmp_path / "shout.py").write_text(
        command.format("it loudly") + "def run(args):\n    print('HEY\\n' * args.n)\n    return 7\n"
    )
    (tmp_path / "failing.py").write_text(
        "from potstill.cache.errors import SpecMismatch\n"
        + command.format("no")
        + "def run(args):\n    raise SpecMismatch('two\\nlin\\x1b[31mes')\n"
    )
    (tmp_path / "sleepy.py").write_text(
        "import time\n" + command.format("zzz") + "def run(args):\n    print('up', flush=True)\n    time.sleep(60)\n"
    )
    (tmp_path / "lacking.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "torn.py").write_text("import potstill.clients.a_module_that_is_not_there\n")
    return tmp_path


def test_help_names_every_command_with_its_summary(commands: Path) -> None:
    done = potstill("--help", PYTHONPATH=str(commands))
    assert done.returncode == 0, done.stderr
    told = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "teachers list a running service's teachers; add, scale or remove one" in told
    assert any(line.startswith("serve serve teachers over HTTP") for line in told)
    assert "shout says it loudly" in told
    assert any(line.startswith("lacking (needs the module 'a_module_that_is_not_there'") for line in told)


def test_help_says_what_its_words_mean_in_80_columns() -> None:
    told = inside("--help").stdout
    for word in ("row", "position", "shard", "segment", "segment set", "capture", "journal", "tail"):
        assert word in told.partition("words:\n")[2], word
    assert max(map(len, told.splitlines())) <= 80
    assert "`potstill --help` says what a row" in inside("estimate", "--help").stdout


def arguments_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                yield from arguments_of(action.choices[name])
        else:
            yield action


@pytest.mark.parametrize("name", command_entry_points())
def test_every_argument_is_explained(name: str) -> None:
    parser = argparse.ArgumentParser()
    command_entry_points()[name].load().add_arguments(parser)
    assert [action.dest for action in arguments_of(parser) if not action.help] == []


def test_a_command_gets_its_arguments_and_gives_its_status(commands: Path) -> None:
    done = potstill("shout", "--n", "2", PYTHONPATH=str(commands))
    assert (done.returncode, done.stdout) == (7, "HEY\nHEY\n\n")


def test_version_and_usage() -> None:
    assert potstill("--version").stdout.startswith("potstill 0.")
    none = inside()
    assert (none.returncode, none.stdout) == (2, "")
    assert "usage: potstill" in none.stderr
    unknown = inside("prefil")
    assert unknown.returncode == 2
    assert "unknown command 'prefil'" in unknown.stderr
    assert "prefill" in unknown.stderr
    option = inside("--verbose")
    assert option.returncode == 2
    assert "unknown option '--verbose'" in option.stderr
    assert inside("teachers").returncode == 2
    assert inside("teachers", "scale", "smol", "many").returncode == 2


def test_an_error_is_one_line_and_status_1(commands: Path) -> None:
    done = potstill("failing", PYTHONPATH=str(commands))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "spec_mismatch: two lin\\x1b[31mes\n")
    done = potstill("lacking", PYTHONPATH=str(commands))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "a_module_that_is_not_there" in done.stderr


def test_a_missing_module_of_ours_is_no_missing_extra(commands: Path) -> None:
    done = potstill("torn", PYTHONPATH=str(commands))
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'potstill.clients.a_module_that_is_not_there'" in done.stderr
    assert "pip install" not in done.stderr


def test_ctrl_c_is_one_line_and_status_130(commands: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "sleepy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(commands)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_a_reader_that_has_had_enough_is_no_traceback(commands: Path) -> None:
    line = f"{sys.executable} -m potstill.clients.cli shout --n 200000 | head -n 1"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(commands)},
        check=True,
    )
    assert (done.stdout, done.stderr) == ("HEY\n", "")


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    done = inside("ingest", "--cache", str(tmp_path / "c"), "--corpus", "a", "--tokenizer", "x" * 300, "y" * 300)
    assert done.returncode == 1
    assert done.stderr.startswith("potstill: [Errno 36] File name too long")
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_without_the_letter_gets_another_one() -> None:
    done = potstill("estimate", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "? 2" in done.stdout or "? 1" in done.stdout or " ? " in done.stdout


def test_only_the_chosen_command_is_loaded() -> None:
    code = (
        "import sys\n"
        "from potstill.clients import cli\n"
        "assert cli.main(['teachers', 'list', '--url', 'nonsense']) == 1\n"
        "heavy = {'torch', 'vllm', 'fastapi', 'uvicorn', 'zarr', 'transformers', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("invalid_input: 'nonsense' is not the URL of a service")


def test_commands_load_nothing_heavy_before_they_run() -> None:
    """But for the service's own, which are parts of it. `--help` loads them all, for their summaries."""
    code = (
        "import sys\n"
        "from potstill.cache.entry_points import command_entry_points\n"
        "found = [each for each in command_entry_points().values() if '.teacher_service.' not in each.value]\n"
        "assert all(each.load().SUMMARY for each in found)\n"
        "heavy = {'torch', 'vllm', 'fastapi', 'uvicorn', 'zarr', 'pyarrow', 'transformers', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_the_packages_import_nothing_heavy() -> None:
    code = (
        "import sys, potstill.clients.cli, potstill.teacher_service\n"
        "heavy = {'httpx', 'pyarrow', 'fastapi', 'uvicorn', 'zarr', 'rich', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_it_starts_fast() -> None:
    # Processor seconds, as checks share their machine; a heavy import costs several.
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    potstill("--version")
    assert spent() - before < 1.5


def test_teachers_are_listed_as_a_table_and_as_json(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    table = inside("teachers", "list", "--url", url)
    assert table.returncode == 0, table.stderr
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["teacher", "state", "model", "vocabulary", "dtype", "max", "k", "replicas"]
    assert lines[1].split() == ["smol", "ready", "fake", "64", "float32", "64", "1", "of", "at", "most", "1"]
    assert lines[-2].split() == ["smol", "in-process", "ready", "0", "0"]
    assert "\x1b" not in table.stdout
    listed = json.loads(inside("teachers", "list", "--json", "--url", url).stdout)
    assert [teacher["name"] for teacher in listed] == ["smol", "large"]
    assert listed[0]["replicas"]["each"][0]["state"] == "ready"
    assert listed[0]["identity"] == FakeTeacher().identity.to_json()


def test_a_teacher_is_scaled(url: str) -> None:
    assert inside("teachers", "scale", "smol", "1", "--url", url).stdout == "smol: 1 of at most 1\n"
    done = inside("teachers", "scale", "smol", "1", "--json", "--url", url)
    assert json.loads(done.stdout)["target"] == 1
    refused = inside("teachers", "scale", "smol", "2", "--url", url)
    assert refused.returncode == 1
    assert refused.stderr.startswith("limit_exceeded: 2 replicas were asked for")
    unknown = inside("teachers", "scale", "nobody", "1", "--url", url)
    assert unknown.stderr == "unknown_teacher: there is no teacher 'nobody'; known are smol, large\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["scale", "smol"], "give either N, a number of replicas, or --autoscale MIN:MAX:TOKENS"),
        (["scale", "smol", "2", "--autoscale", "1:2:3"], "give either N"),
        (["scale", "smol", "--autoscale", "1:2"], "write MIN:MAX:TOKENS, like 1:4:20000"),
        (["add", "smol"], "the teacher 'smol': write NAME=MODEL"),
        (["add", "a=b", "--option", "k"], "write KEY=VALUE"),
        (["list", "--api-key-env", "NO_SUCH_KEY"], "there is no such environment variable"),
    ],
)
def test_what_cannot_be_asked_of_a_service_is_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["teachers", *arguments, "--url", "http://127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("invalid_input: ")
    assert reason in told
    assert told.count("\n") == 1


def test_a_teacher_is_added_and_removed(url: str) -> None:
    added = inside("teachers", "add", f"copy={url}#smol", "--option", "attempts=2", "--replicas", "1", "--url", url)
    assert added.stdout == "copy: ready\n", added.stderr
    again = inside("teachers", "add", f"copy={url}#large", "--url", url, "--api-key-env", "HOME")
    assert again.stderr.startswith("spec_mismatch: teacher 'copy' is there with another model, options;")
    limits = inside("teachers", "scale", "copy", "--autoscale", "1:2:100", "--url", url)
    assert limits.stderr.startswith("limit_exceeded: 2 replicas were asked for")
    fixed = inside("teachers", "scale", "copy", "1", "--no-autoscale", "--url", url)
    assert fixed.stdout == "copy: 1 of at most 1\n"
    assert inside("teachers", "remove", "copy", "--url", url).stdout == "copy: draining\n"


def test_a_service_that_is_not_there_is_one_line() -> None:
    done = inside("teachers", "list", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("unavailable: http://127.0.0.1:1 cannot be reached")
    assert done.stderr.count("\n") == 1


def test_an_entry_point_is_used_as_it_is() -> None:
    point = EntryPoint(name="x", value="types:SimpleNamespace", group="potstill.commands")
    assert cli._load(point) is SimpleNamespace  # type: ignore[comparison-overlap]
