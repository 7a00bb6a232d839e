"""The page of the study, made of its results alone: nothing in it is written by hand after a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.claims import EQUAL_SHARE, judged
from benchmarks.study.comparing import ECE, Results, in_words
from benchmarks.study.plan import CROSS_ENTROPY, DENSE, Cell, Plan
from benchmarks.study.plots import write_curves, write_differences
from benchmarks.study.results import ACCEPTANCE, KL, LOSS, REVERSE_KL, TOP1
from potstill.student_trainer.ablate.intervals import Difference, Interval

_MEASURES = {
    LOSS: ("loss", ".4f"),
    KL: ("KL to the teacher", ".4f"),
    REVERSE_KL: ("reverse KL", ".3f"),
    TOP1: ("same top-1", ".1%"),
    ACCEPTANCE: ("acceptance", ".1%"),
    ECE: ("ECE", ".2%"),
}
_PAPER = "[Sparse Logit Sampling](https://arxiv.org/abs/2503.16870)"


def write_page(docs: Path, results: Results, manifest: Mapping[str, Any], facts: Mapping[str, Any] | None) -> None:
    """Write `study.md`, and the plots that it shows."""
    plots = _plots(docs / "study", results)
    parts = [
        _head(results),
        _claims(results),
        _means(results),
        *(_differences(results, base) for base in (CROSS_ENTROPY, DENSE)),
        *plots,
        _others(results),
        _how(results.plan, manifest, facts),
        _made(results),
    ]
    (docs / "study.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _head(results: Results) -> str:
    plan = results.plan
    runs = [(cell.name, seed) for seed in plan.seeds for cell in plan.cells]
    lacking = [f"{cell} ({seed})" for cell, seed in runs if (cell, seed) not in results.found]
    told = f" **Not run yet**, with their seeds: {', '.join(lacking)}." if lacking else ""
    return (
        "# A study of this project\n\n"
        "What is each choice worth? Small students learn from SmolLM2-135M's kept targets on real text, each in one "
        "way, with the same initial weights, rows and order within a seed, and are judged on the same held-out "
        "documents by the teacher's whole distributions. The page is written by `python -m benchmarks.study` from the "
        "results alone, verdicts included.\n\n"
        f"{len(results.found)} of {len(runs)} runs are there ({len(plan.cells)} cells, {len(plan.seeds)} seeds).{told}"
    )


def _claims(results: Results) -> str:
    told = judged(results)
    rows = [
        (
            each.claim.told,
            f"{each.claim.cell} less {each.claim.base}, {_MEASURES[each.claim.measure][0]}",
            "-" if each.difference is None else f"{each.difference.value:+.4f}",
            *(_intervals(each.difference)),
            f"**{each.verdict}**" + _seeds(each.seeds, len(results.plan.seeds)),
        )
        for each in told
    ]
    verdicts = Counter(each.verdict for each in told)
    return (
        f"## Claims of {_PAPER}\n\n"
        "The paper's students have 300 million parameters and more and billions of tokens; these are far smaller, so "
        "what is refuted here is refuted for such students. A claim is reproduced or refuted only if both 95% "
        'intervals leave zero out: over seeds (Student\'s t) and over held-out documents (bootstrap-t). "As good as" '
        f"means within {EQUAL_SHARE:.0%} of what all probabilities gain over none.\n\n"
        f"Of {len(told)} claims: {', '.join(f'{number} {verdict}' for verdict, number in verdicts.most_common())}."
        + _least(results)
        + "\n\n"
        + _table(("claim", "difference", "mean", "seeds", "documents", "verdict"), rows)
    )


def _least(results: Results) -> str:
    """Say how large a difference must be to be told from another order of rows and other initial weights."""
    found = [results.difference(cell.name, CROSS_ENTROPY) for cell in results.plan.cells if not cell.large]
    over_seeds = [each.over_seeds for each in found if each is not None and each.over_seeds is not None]
    if not over_seeds:
        return ""
    half = float(np.median([(each.high - each.low) / 2.0 for each in over_seeds]))
    return (
        f" Seeds are what is uncertain: half of the cells' losses less that of cross-entropy are known to ±{half:.2f} "
        f"nats or worse over {len(results.plan.seeds)} seeds, and smaller effects than that are mostly not seen here."
    )


def _means(results: Results) -> str:
    rows = []
    for cell in results.plan.cells:
        found = results.of(cell.name)
        if found:
            means = ((results.mean(cell.name, name), form) for name, (_, form) in _MEASURES.items())
            values = ["-" if value is None else format(value, form) for value, form in means]
            flops = f"{found[0].flops / 1e12:.1f}"
            rows.append((_named(cell, results), cell.told, *values, f"{found[0].tokens:,}", flops))
    titles = ("cell", "learns from", *(title for title, _ in _MEASURES.values()), "tokens", "Tflop")
    return (
        ""
        if not rows
        else (
            "## All cells\n\nMeans over the held-out tokens and the seeds. Loss and KL are in nats a token, KL(teacher "
            "‖ student) and the reverse are exact over the whole vocabulary, acceptance is Σ min(p, t), and ECE the "
            "expected calibration error. Tflop counts six operations for each parameter and token of training. Cells "
            "of another width or number of tokens compare among themselves only.\n\n" + _table(titles, rows)
        )
    )


def _differences(results: Results, base: str) -> str:
    rows = []
    for cell in results.plan.cells:
        found = {name: results.difference(cell.name, base, name) for name in (LOSS, KL)}
        if not cell.large and found[LOSS] is not None:
            told = [text for each in found.values() if each is not None for text in _difference(each)]
            seeds = len(results.common(cell.name, base))
            rows.append((cell.name + _seeds(seeds, len(results.plan.seeds)), *told))
    one = ("seeds", "documents", "")
    return (
        ""
        if not rows
        else (
            f"## Less {base}\n\nPaired differences, with 95% intervals over seeds and over documents. `noise`: one of "
            "them has zero in it; `unknown`: one is missing, for fewer than two seeds that differ or ten documents.\n\n"
            + _table(("cell", "loss", *one, "KL", *one), rows)
        )
    )


def _others(results: Results) -> str:
    """Tell of cells that compare with another than those two, by kind of text where they have other teachers."""
    rows = []
    for cell in results.plan.cells:
        if cell.baseline in (cell.name, CROSS_ENTROPY):
            continue
        kinds = (
            (None, *dict.fromkeys(package.kind for package in results.plan.packages)) if cell.needs_second else (None,)
        )
        for kind in kinds:
            found = results.difference(cell.name, cell.baseline, LOSS, kind)
            if found is not None:
                name = f"{cell.name} less {cell.baseline}" + _seeds(
                    len(results.common(cell.name, cell.baseline)), len(results.plan.seeds)
                )
                rows.append((name, kind or "all", *_difference(found)))
    return (
        ""
        if not rows
        else (
            "## A second teacher, and where a student begins\n\n"
            + _second(results.plan)
            + "\n\n"
            + _table(("cells", "text", "loss", "seeds", "documents", ""), rows)
        )
    )


def _second(plan: Plan) -> str:
    tokens = plan.specialist_steps * 4 * plan.row_tokens
    return (
        f"The second teacher is the first one after {plan.specialist_steps} steps of cross-entropy on {tokens:,} "
        f"tokens of {' and '.join(plan.specialist_rows)} code, of documents that are not in the sample: another "
        "teacher only a little. The wide students have two layers of the teacher's width and learn from fewer tokens; "
        "both have the same shape, and so the same compute."
    )


def _how(plan: Plan, manifest: Mapping[str, Any], facts: Mapping[str, Any] | None) -> str:
    size = sum(each["bytes"] for each in manifest["kinds"].values())
    rows = [
        (kind, f"{each['documents']:,}", f"{each['bytes']:,}", f"`{each['sha256'][:16]}`", f"{plan.rows.get(kind, 0)}")
        for kind, each in manifest["kinds"].items()
    ]
    sample = sum(plan.rows.values())
    return (
        "## How it is made\n\n"
        f"- Text: {size / 1e6:.0f} MB of {', '.join(manifest['packages'])}, Debian packages whose markup is taken out. "
        "It is not shipped; a machine whose text has other hashes is refused.\n"
        f"- Sample: {sample} rows of {plan.row_tokens} tokens, each of another document; {plan.held_out} of them are "
        f"held out. The teacher's top-{plan.k}, {plan.draws} draws and all logprobs are kept for each position by "
        f"`potstill prefill`'s path, top-k in `u8`; {plan.fewer_draws} draws are some of the {plan.draws}.\n"
        f"- Students: two layers of width {plan.hidden_size}, {plan.steps} steps of {plan.batch_rows} rows, AdamW at "
        f"{plan.lr:g}; wide ones {plan.wide_steps} steps at {plan.wide_lr:g}. Teachers' cells have `alpha = 1`: no "
        "cross-entropy beside the distillation.\n"
        + _facts(facts)
        + "\n"
        + _table(("kind", "documents", "bytes", "sha256", "rows"), rows)
    )


def _facts(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    unique = ", ".join(f"{number} of {draws}" for draws, number in facts["unique"].items())
    tails = ", ".join(f"{mass:.1%} at {k}" for k, mass in facts["tail"].items())
    return (
        f"- The teacher: its own loss on the sample is {facts['loss']:.4f}. Different ids among the draws of a "
        f"position, on average: {unique}; mass outside its top-k: {tails}.\n"
    )


def _made(results: Results) -> str:
    found = sorted(results.found.values(), key=lambda each: each.made["time"])
    if not found:
        return ""
    machines, commits, torches = (
        ", ".join(sorted({each.made[key] for each in found})) for key in ("machine", "commit", "torch")
    )
    seconds = sum(each.seconds for each in found)
    return (
        f"Made from {found[0].made['time']} to {found[-1].made['time']} on {machines}, torch {torches}, commits "
        f"{commits}: {seconds / 3600:.1f} hours of training, beside other work. No GPU."
    )


def _plots(folder: Path, results: Results) -> Iterator[str]:
    small = [cell.name for cell in results.plan.cells if not cell.large]
    yield "In the plots, the thick bar is the interval over seeds, and the thin one that over documents."
    for measure, base in ((LOSS, CROSS_ENTROPY), (LOSS, DENSE), (KL, DENSE)):
        every = {name: results.difference(name, base, measure) for name in small}
        found = {name: each for name, each in every.items() if each is not None}
        if found:
            file, title = f"{measure}-{base}.svg", f"{_MEASURES[measure][0]} less that of {base}, nats a token"
            write_differences(folder / file, title, found)
            yield f"![{title}](study/{file})"
    curves = {name: _curve(results, name) for name in small if results.of(name)}
    if curves:
        write_curves(folder / "curves.svg", "held-out loss, nats a token", curves)
        yield "![held-out loss over the tokens learnt](study/curves.svg)"


def _curve(results: Results, name: str) -> list[list[float]]:
    found: list[list[float]] = np.mean([each.curve for each in results.of(name)], axis=0).tolist()
    return found


def _difference(found: Difference) -> tuple[str, ...]:
    return (f"{found.value:+.4f}", *_intervals(found), in_words(found))


def _intervals(found: Difference | None) -> tuple[str, str]:
    over = (None, None) if found is None else (found.over_seeds, found.over_documents)
    return _interval(over[0]), _interval(over[1])


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found.low:+.4f} to {found.high:+.4f}"


def _named(cell: Cell, results: Results) -> str:
    return cell.name + _seeds(len(results.of(cell.name)), len(results.plan.seeds))


def _seeds(number: int, wanted: int) -> str:
    return "" if number == wanted else f" ({number} of {wanted} seeds)"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
