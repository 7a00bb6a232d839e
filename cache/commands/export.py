"""`potstill export`: write committed targets as Parquet files of one row per corpus row."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.commands.root_option import add_root_argument
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.cache.types import Fields

if TYPE_CHECKING:
    from potstill.cache.interchange import RowFormat
    from potstill.cache.targets import TargetSet

SUMMARY = "write a teacher's targets as Parquet files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_root_argument(parser)
    parser.add_argument("--corpus", required=True, metavar="NAME", help="whose rows")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="whose targets, as `inspect` lists it")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a local folder; one file a shard")
    parser.add_argument(
        "--format",
        choices=("parquet", "distillkit"),
        default="parquet",
        help="list columns that anything reads, or DistillKit's compressed dataset (default %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="entries a position (default: all that are kept)")
    parser.add_argument("--shards", metavar="A:B", help="from shard A up to, without, B (default: all)")
    parser.add_argument(
        "--compression-config",
        metavar="FILE",
        help="DistillKit's logprob_compressor in YAML or JSON (default: its recommended one with normalize_t)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print a summary; finished files are not written again."""
    from potstill.cache.cache import Cache
    from potstill.cache.interchange import export_shards

    if "://" in args.to:
        raise InvalidInput(f"--to {args.to!r} must be a local folder; copy the files from there")
    if Path(args.to).is_file():
        raise InvalidInput(f"--to {args.to!r} is a file; name a folder")
    targets = Cache.open(args.cache).targets(args.teacher, args.corpus)
    shards = _shards(args.shards, targets.corpus.num_shards)
    fields = _fields(targets.fields, args.top_k)
    folder = Path(args.to)
    form, fields = _format(args, targets, fields, folder)
    with progress("export", "positions") as show:
        report = export_shards(targets, folder, form, shards, fields=fields, on_progress=show)
    left_out = args.format == "distillkit" and targets.corpus.has_loss_mask
    print(
        f"{args.to}: {counted(report.files_written, 'file')} written, {report.files_before} there before; "
        f"{counted(report.num_bytes, 'byte')} in all"
        f"{'; the loss mask is left out: DistillKit has none' if left_out else ''}"
    )
    return 0


def _format(args: argparse.Namespace, targets: TargetSet, fields: Fields, folder: Path) -> tuple[RowFormat, Fields]:
    """Choose the format, and those of the fields that it can hold."""
    from potstill.cache.interchange.distillkit import CompressedRows
    from potstill.cache.interchange.distillkit_config import preset, read_config, write_config
    from potstill.cache.interchange.parquet import ListColumns

    vocab_size = targets.identity.vocab_size
    if args.format == "parquet":
        if args.compression_config:
            raise InvalidInput("--compression-config is for --format distillkit; leave it away")
        return ListColumns.to_write(fields, vocab_size, targets.corpus), fields
    if not fields.k:
        raise InvalidInput(f"teacher {targets.teacher!r} has no top-k, and DistillKit knows nothing else")
    if fields.alignment:
        raise InvalidInput(
            f"targets of {targets.teacher!r} for corpus {targets.corpus.name!r} are projected, and DistillKit's rows "
            "cannot say how much of a position is not resolved; leave --format away"
        )
    config = read_config(args.compression_config) if args.compression_config else preset(fields.k, vocab_size)
    if config.k > fields.k or config.d < vocab_size:
        raise InvalidInput(
            f"--compression-config has k={config.k} of d={config.d}; the targets have k={fields.k} of {vocab_size}"
        )
    write_config(config, folder)
    return CompressedRows(config, vocab_size), Fields(k=config.k)


def _fields(kept: Fields, top_k: int | None) -> Fields:
    from dataclasses import replace

    if top_k is None or top_k == kept.k:
        return kept
    if not 1 <= top_k <= kept.k:
        raise InvalidInput(f"--top-k is {top_k}; it must be 1 to {kept.k}, which is what is kept")
    return replace(kept, k=top_k)


def _shards(text: str | None, num_shards: int) -> range:
    if text is None:
        return range(num_shards)
    first, colon, last = text.partition(":")
    if colon and (first or "0").isdecimal() and (last or "0").isdecimal():
        chosen = range(int(first or 0), int(last or num_shards))
        if chosen and chosen.stop <= num_shards:
            return chosen
    raise InvalidInput(f"--shards {text!r} must be A:B with 0 <= A < B <= {num_shards}")
