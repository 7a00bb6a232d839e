#!/usr/bin/env bash
# From raw text to the table of README.md: run.sh [FOLDER]. Stopped, the same command goes on.
set -eu
program() { # NAME: its path, wherever we go
    case $(type -P "$1") in
        "") echo "run.sh: there is no program $1; name it by POTSTILL or PYTHON" >&2; exit 1 ;;
        /*) type -P "$1" ;;
        *) echo "$PWD/$(type -P "$1")" ;;
    esac
}
potstill=$(program "${POTSTILL:-potstill}")
python=$(program "${PYTHON:-python}")
recipe=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-build/lokilm-tiny}"
cd "${1:-build/lokilm-tiny}"
cp -r "$recipe"/*.toml "$recipe"/questions.jsonl "$recipe"/tasks .

say() { printf '\n== %s [%d s]\n' "$1" "$SECONDS"; }
once() { [ -e "$1" ] || "${@:2}"; } # what is there when the command is done, and the command

say "1. Text: for the student, and more for its teacher"
once raw "$python" "$recipe/prepare.py" text raw
for text in text more; do
    once filtered/$text/potstill-filter.json "$potstill" filter raw/$text --out filtered/$text --rules filter.toml
done
once tokenizer "$python" "$recipe/prepare.py" tokenizer tokenizer filtered/more
once smollm2 "$python" "$recipe/prepare.py" smollm2 smollm2

say "2. Corpora: the student's tokens, and SmolLM2's of the same documents"
ingest() { # CORPUS TEXT TOKENIZER
    once cache/corpora/"$1"/zarr.json "$potstill" ingest filtered/"$2" --cache cache --corpus "$1" \
        --tokenizer "$3" --row-tokens 256 --shard-positions 4096
}
ingest text text tokenizer
ingest more more tokenizer
ingest text-smollm2 text smollm2
for corpus in text more; do
    once cache/corpora/$corpus/annotations/contaminated.json \
        "$potstill" contamination --cache cache --corpus $corpus --against questions.jsonl tasks/truth.jsonl
done
"$potstill" card --cache cache --corpus text --filter filtered/text --out card.md

say "3. A teacher with the student's tokenizer, trained on more text"
"$potstill" train teacher.toml --no-ray
"$potstill" prefill --cache cache --corpus text --teacher loki=runs/teacher/model --top-k 32

say "4. A teacher with another tokenizer, projected"
"$potstill" prefill --cache cache --corpus text-smollm2 --teacher smollm2=smollm2 --top-k 32
"$potstill" project --cache cache --corpus text --teacher smollm2 --from text-smollm2

say "5. Students: four ways, three seeds; their loss, calibration and truthfulness"
"$potstill" ablate grid.toml --no-ray --html ablation.html

say "6. One of them, evaluated"
"$potstill" evaluate runs/ablation/runs/two-teachers/0 --html evaluation.html
say "Done: card.md, ablation.html, evaluation.html"
