"""`potstill import`: take targets from Parquet files into a cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from potstill.cache.commands.progress import progress
from potstill.cache.errors import InvalidInput
from potstill.cache.plurals import counted
from potstill.cache.types import Fields, TeacherIdentity

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from potstill.cache.interchange import ImportReport, RowFormat
    from potstill.cache.interchange.row_files import RowFile

SUMMARY = "take over targets kept as Parquet or by DistillKit"

_MOST_IDS = 2**32
_IDENTITY = ("model", "revision", "weights_sha256", "vocab_size", "dtype", "head_dtype", "quantization")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a Parquet file, or a folder of them")
    parser.add_argument("--cache", required=True, metavar="ROOT", help="folder or URL; a new folder is made")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="made of the files' rows if it is not there")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="what to call the teacher here")
    parser.add_argument("--tokenizer", required=True, metavar="PATH_OR_NAME", help="the one that made the rows")
    parser.add_argument(
        "--format",
        choices=("parquet", "distillkit"),
        default="parquet",
        help="list columns, or DistillKit's compressed dataset (default %(default)s)",
    )
    parser.add_argument("--encoding", default="u8", help="how they are kept here (default %(default)s)")
    parser.add_argument("--shard-positions", type=int, metavar="N", help="of a new corpus (default: as of `ingest`)")
    parser.add_argument(
        "--compression-config", metavar="FILE", help="default: compression_config.yaml beside the files"
    )
    teacher = parser.add_argument_group("whose targets they are, for files that `potstill export` did not write")
    teacher.add_argument("--model", metavar="NAME", help="the model's name; needed for such files")
    teacher.add_argument("--vocab-size", type=int, metavar="V", help="how many ids its logprobs range over")
    for name, about in (
        ("revision", "of the model, such as a commit of the hub"),
        ("weights-sha256", "hash of the weights"),
        ("dtype", "of the forward pass, such as bfloat16"),
        ("head-dtype", "of the last layer and the softmax"),
        ("quantization", "of the weights, where there is one"),
    ):
        teacher.add_argument(f"--{name}", metavar="TEXT", help=about)


def run(args: argparse.Namespace) -> int:
    """Import, and print a summary; committed shards are not read again."""
    from potstill.cache.cache import Cache
    from potstill.cache.corpus.tokenizer import load_tokenizer
    from potstill.cache.corpus.tokenizer_files import load_tokenizer_files
    from potstill.cache.encoding.logprobs import encoding_by_name
    from potstill.cache.interchange import ImportPlan, import_targets
    from potstill.cache.interchange.row_files import row_files
    from potstill.cache.store.root import check_name

    # All arguments are checked before a cache folder is made.
    check_name("corpus", args.corpus)
    check_name("teacher", args.teacher)
    encoding_by_name(args.encoding)
    tokenizer = load_tokenizer(args.tokenizer)
    files = row_files(args.sources, ("input_ids",))
    form, fields, identity = _format(args, files, tokenizer)
    plan = ImportPlan(
        corpus=args.corpus,
        teacher=args.teacher,
        identity=identity,
        fields=fields,
        encoding=args.encoding,
        shard_positions=args.shard_positions,
        tokenizer_files=load_tokenizer_files(args.tokenizer),
    )
    cache = Cache.open(args.cache, mode="r+")
    with progress("import", "positions") as show:
        report = import_targets(cache, files, form, tokenizer, plan, on_progress=show)
    print(_summary(plan.teacher, plan.corpus, report) + _scaled(form))
    return 0


def _summary(teacher: str, corpus: str, report: ImportReport) -> str:
    made = "made" if report.corpus_made else "was there"
    absent = f", {report.shards_absent} not in the files" if report.shards_absent else ""
    return (
        f"{teacher}: {counted(report.shards_written, 'shard')} committed, {report.shards_before} before{absent}; "
        f"corpus {corpus} {made}"
    )


def _scaled(form: RowFormat) -> str:
    from potstill.cache.interchange.distillkit import CompressedRows

    if not isinstance(form, CompressedRows) or not form.scaled.positions:
        return ""
    count, most = form.scaled.positions, form.scaled.most
    return f"; {counted(count, 'position')} held more than all mass (at most {most:.4g}) and were scaled to it"


def _format(
    args: argparse.Namespace, files: list[RowFile], tokenizer: Tokenizer
) -> tuple[RowFormat, Fields, TeacherIdentity]:
    from potstill.cache.interchange.distillkit import CompressedRows
    from potstill.cache.interchange.distillkit_config import find_config
    from potstill.cache.interchange.parquet import list_columns, require_alike

    origin = files[0].origin
    if args.format == "distillkit":
        config = find_config(args.compression_config, files[0].path)
        identity = _identity(args, files, tokenizer, config.d)
        rows = CompressedRows(config, identity.vocab_size)
        rows.require_columns(files[0].path)
        return rows, Fields(k=config.k), identity
    if args.compression_config:
        raise InvalidInput("--compression-config is for --format distillkit; leave it away")
    identity = _identity(args, files, tokenizer, None)
    require_alike([file.path for file in files])
    columns = list_columns(files[0].path, None if origin is None else origin.fields, identity.vocab_size)
    return columns, columns.fields, identity


def _identity(
    args: argparse.Namespace, files: list[RowFile], tokenizer: Tokenizer, vocab_size: int | None
) -> TeacherIdentity:
    """Identity of the teacher: the one that the files name, or the one of the command line."""
    from potstill.cache.corpus.tokenizer import fingerprint

    given = {name: getattr(args, name) for name in _IDENTITY if getattr(args, name) is not None}
    origin = files[0].origin
    if origin is not None:
        if given:
            name = next(iter(given)).replace("_", "-")
            raise InvalidInput(f"{files[0].path} says whose targets it holds; leave --{name} away")
        return origin.identity
    if "model" not in given:
        raise InvalidInput(f"{files[0].path} does not say whose targets it holds; name the teacher with --model")
    given.setdefault("vocab_size", vocab_size)
    if given["vocab_size"] is None or given["vocab_size"] < 1:
        raise InvalidInput("--vocab-size is needed: how many ids the teacher's logprobs range over")
    if given["vocab_size"] > _MOST_IDS:
        raise InvalidInput(f"--vocab-size is {given['vocab_size']}; ids are below {_MOST_IDS}")
    unknown = dict.fromkeys(("revision", "weights_sha256", "dtype", "head_dtype"), "unknown")
    return TeacherIdentity(**{**unknown, **given}, tokenizer_sha256=fingerprint(tokenizer))
