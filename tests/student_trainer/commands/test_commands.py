"""`potstill train` and `potstill evaluate` as somebody runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from potstill.clients.cli import main
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.metrics.records import read_metrics
from tests.support.tiny_runs import STUDENT, write_cache

CONFIG = """
[data]
cache = "{root}"
corpus = "docs"
held_out = 8

[[teachers]]
name = "fake"

[student]
config = {student}

[train]
out = "{out}"
steps = {steps}
batch_rows = 8
lr = 1e-2
eval_every = 100000
checkpoint_every = 100000
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def write_config(root: Path, folder: Path, *, steps: int) -> Path:
    student = "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in STUDENT.items()) + "}"
    file = folder / "run.toml"
    file.write_text(CONFIG.format(root=root, out=folder / "run", steps=steps, student=student))
    return file


def potstill(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from potstill.clients.cli import main; raise SystemExit(main())", *arguments]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def started(file: Path) -> subprocess.Popen[str]:
    command = potstill("train", str(file), "--no-ray")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in read_metrics(run)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_train_then_evaluate(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_config(root, tmp_path, steps=5)), "--no-ray"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("training in this process\n")
    assert "step 5/5  loss" in out
    assert "held-out ce" in out
    assert str(tmp_path / "run" / "model") in out
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found, told = json.loads(shown), summary["held_out"]
    assert found["held_out"]["loss"]["value"] == pytest.approx(told["ce"], rel=1e-5)
    assert (found["held_out"]["rows"], found["held_out"]["documents"]) == (told["rows"], told["documents"])
    against, before = found["teachers"]["fake"], told["teachers"]["fake"]
    names = {"kl": "kl", "top1": "top1_agreement", "mass": "student_mass_on_top_k"}
    assert {old: against[new]["value"] for new, old in names.items()} == pytest.approx(before, rel=1e-5)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "held-out rows: against teachers" in capsys.readouterr().out
    # Neither torch nor Ray is needed to say that there is nothing left to do; what a newer version adds does no harm.
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "added_later": 1}))
    code = (
        "import sys; sys.modules.update(torch=None, ray=None)\n"
        f"from potstill.clients.cli import main; raise SystemExit(main(['train', {str(tmp_path / 'run.toml')!r}]))"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("finished before, at step 5; ask for more train.steps, or choose another --out\n")
    assert again.stdout.splitlines()[1:] == out.splitlines()[-3:]


def test_a_student_is_not_shared_with_nobody(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(root, tmp_path, steps=5)
    file.write_text(file.read_text() + 'parallel = "fsdp"\n')
    assert main(["train", str(file), "--no-ray"]) == 1
    assert 'train.parallel is "fsdp", but --no-ray trains with 1 worker; leave it out' in capsys.readouterr().err


def test_many_processes_do_not_train_alone_in_one_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as torchrun does
    assert main(["train", str(write_config(root, tmp_path, steps=5)), "--no-ray"]) == 1
    assert "torchrun -m potstill.student_trainer.launch.torchrun" in capsys.readouterr().err


def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(root, tmp_path, steps=100_000)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command takes no signals"))

    def terminate() -> None:
        wait_for_step(tmp_path / "run", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with ThreadPoolExecutor(1) as thread:
            sent = thread.submit(terminate)
            status = main(["train", str(file), "--no-ray"])
            sent.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    shown = capsys.readouterr()
    check_stopped_and_going_on(root, tmp_path, signal.SIGTERM, (status, shown.out, shown.err))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_of_its_own(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = started(write_config(root, tmp_path, steps=100_000))
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    check_stopped_and_going_on(root, tmp_path, number, finish(process))


def check_stopped_and_going_on(root: Path, tmp_path: Path, number: signal.Signals, ended: tuple[int, str, str]) -> None:
    status, out, err = ended
    assert (status, err) == (128 + number, "")
    assert "the same command goes on from there" in out
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped at step {last} of 100000" in out
    assert main(["train", str(write_config(root, tmp_path, steps=last + 2)), "--no-ray"]) == 0
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, last + 3))


def test_what_can_be_told_without_torch_is_told_before_it_is_imported(root: Path, tmp_path: Path) -> None:
    good = write_config(root, tmp_path, steps=1).read_text()
    config = TrainConfig.from_toml(tmp_path / "run.toml")
    no_rows = config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0})})
    for name, each in (("ended", config), ("bare", no_rows)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(each.to_json()))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name, new in (("key", good + "stops = 3\n"), ("teacher", good.replace('"fake"', '"big"'))):
        (tmp_path / f"{name}.toml").write_text(new)
    told = {
        "train nowhere.toml": "there is no file 'nowhere.toml'",
        "train key.toml": "train.stops",
        "train teacher.toml": "big",
        "evaluate a/b/nowhere": "'a/b/nowhere': there is no such folder here",
        "evaluate bare": "run 'bare' has no held-out rows: its data.held_out is 0",
        "evaluate ended --corpus other": "no corpus 'other'",
        "evaluate ended --cache nowhere": "nowhere",
        "evaluate model": "is a model and no run, so what to evaluate it on is not known; add --cache ROOT",
        f"evaluate model --cache {root} --corpus other": "no corpus 'other'",
        "ablate nowhere.toml": "there is no file 'nowhere.toml'",
    }
    code = (
        "import sys; sys.modules.update(torch=None, ray=None, lm_eval=None)\n"
        "from potstill.clients.cli import main\n"
        f"for line in {list(told)!r}: assert main(line.split()) == 1, line"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = found.stderr.splitlines()
    assert (found.returncode, found.stdout, len(lines)) == (0, "", len(told)), found.stderr
    for line, part in zip(lines, told.values(), strict=True):
        assert part in line
