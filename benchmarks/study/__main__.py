"""The command of the study; see the package."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.study import __doc__ as told
from benchmarks.study.plan import Plan
from benchmarks.study.study import Study
from potstill.cache.errors import PotstillError
from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise
from potstill.student_trainer.train.interrupt import stop_on_signals


def main() -> int:
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where all that is large is kept, 15 GB")
    parser.add_argument("--hours", type=float, default=2.0, help="stop after so many; 0 writes the page alone")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where study.md and study/ are")
    args = parser.parse_args()
    end = time.monotonic() + 3600 * args.hours
    try:
        study = Study(Plan(), args.folder.absolute(), args.docs.absolute())
        with stop_on_signals() as stop:
            if args.hours:
                study.run(materialise(default_models_folder()), lambda: stop() or time.monotonic() > end)
        print(study.write_page())
    except PotstillError as error:
        print(f"{error.kind}: {error.detail}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
