"""Prints the rooms (our files) that one call passes: a score that the cache misses, one that it answers, `read_rows`.

    python -m benchmarks.support.rooms

A real service of a fake teacher runs in this process behind a real socket, and the interpreter reports every function
that starts between the request and its answer, in any thread. A *gatekeeper* is such a function that can refuse: its
code raises one of our errors. Fakes and clients are not counted, generated code has no file.
"""

from __future__ import annotations

import dis
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import httpx

from potstill.cache import Fields, errors as our_errors
from potstill.cache.cache import Cache
from potstill.cache.read_through.cached_teacher import KeepPolicy
from potstill.teacher_service.hosting.hosted_teacher import Keep
from tests.support.fakes import FakeTeacher
from tests.support.filled_caches import filled_cache
from tests.support.processes.servers import hosted, post_json, serving_teachers

_ROOT = Path(our_errors.__file__).resolve().parents[1]
_FOLDERS = ("cache", "teacher_service")
_ERRORS = {name for name, value in vars(our_errors).items() if isinstance(value, type)}
Codes = set[CodeType]


class Tracer:
    """Notes our code that starts while it is asked to, in every thread that was started after `install`."""

    def __init__(self) -> None:
        self._found: Codes | None = None

    def install(self) -> None:
        """Have the interpreter tell of every call in this thread and those to come."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def trace(self, call: Callable[[], object]) -> Codes:
        """Code of ours that starts while `call` runs."""
        found: Codes = set()
        self._found = found
        call()
        self._found = None
        return {code for code in found if _room(code)}

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if self._found is not None and event == "call":
            self._found.add(frame.f_code)


def _room(code: CodeType) -> str:
    path = Path(code.co_filename)
    path = path.resolve() if path.is_absolute() else path
    if not path.is_relative_to(_ROOT):
        return ""
    inside = path.relative_to(_ROOT)
    return str(inside) if inside.parts[0] in _FOLDERS else ""


def _refuses(code: CodeType) -> bool:
    raises = any(step.opname == "RAISE_VARARGS" and step.arg for step in dis.get_instructions(code))
    return raises and bool(_ERRORS & set(code.co_names))


def report(name: str, codes: Codes) -> str:
    """The rooms by wing, then the gatekeepers."""
    wings: defaultdict[str, list[str]] = defaultdict(list)
    for room in sorted({_room(code) for code in codes}):
        folder, _, file = room.rpartition("/")
        wings[folder].append(file.removesuffix(".py"))
    gatekeepers = Counter(f"{_room(code).removesuffix('.py')}:{code.co_qualname}" for code in codes if _refuses(code))
    lines = [f"{name}: {sum(map(len, wings.values()))} rooms, {len(gatekeepers)} gatekeepers"]
    lines += [f"  {folder}: {' '.join(files)}" for folder, files in sorted(wings.items())]
    lines += [f"  refuses: {each}" for each in sorted(gatekeepers)]
    return "\n".join(lines)


def main() -> None:
    """Trace the three calls and print them."""
    tracer = Tracer()
    tracer.install()
    request = {"rows": [[1, 2, 3]], "fields": {"k": 8}}
    with tempfile.TemporaryDirectory() as folder:
        keep = Keep(Cache.open(Path(folder, "served"), mode="r+"), KeepPolicy())
        with serving_teachers(hosted("smol", FakeTeacher(), keep)) as url:
            post_json(url, {"rows": [[4, 5, 6]]})  # what is imported or made once is not of a request

            def score() -> None:
                reply: httpx.Response = post_json(url, request)
                reply.raise_for_status()

            print(report("score, miss", tracer.trace(score)))
            print(report("score, hit", tracer.trace(score)))
        cache = filled_cache(Path(folder, "filled"), Fields(k=8))
        targets = cache.targets("fake", "docs")
        targets.read_rows([0])
        print(report("read_rows", tracer.trace(lambda: targets.read_rows([1, 2]))))


if __name__ == "__main__":
    main()
