"""The study of this project: what each choice of distillation is worth on real text, with a real small teacher.

    python -m benchmarks.study --folder WORK [--hours 2]

Needs about 15 GB in WORK and Debian's `apt-get` and `dpkg`; nothing is installed, and no text leaves WORK. Stopped or
killed at any moment, the same command goes on. Several at one time share the runs. What comes of each run is a small
file in `docs/study/results`, from which `docs/study.md` is written: `--hours 0` does that alone.
"""
