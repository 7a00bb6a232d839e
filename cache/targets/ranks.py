"""The rank table of a segment set, made once: token ids are stored as their frequency ranks.

    <set>/ranks.json       names the group and the table's sha256; created if absent
    <set>/<ranks>/         ids_by_rank [V] uint32

The table is made from the targets of pilot rows, which are spread over the corpus and the same for every job. So with
a deterministic teacher the stored bytes do not depend on which writer was first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.cache.encoding import RankTable
from potstill.cache.errors import CorruptSegment, TeacherFailed
from potstill.cache.store import GroupReader, GroupWriter
from potstill.cache.store.groups import attempt_name, objects_from_json, removed_on_failure
from potstill.cache.store.new_arrays import Layout
from potstill.cache.store.publishing import publish
from potstill.cache.store.record import Record, read_record, record_bytes, values_read
from potstill.cache.store.root import check_name
from potstill.cache.targets.set_spec import SpecRecord
from potstill.cache.types import Fields, Targets

# More would gain little: with a table of 4,096 positions ids take 93 bytes a position, with one of all positions of the
# corpus 91 (SmolLM2, K=64).
_PILOT_POSITIONS = 32_768
_LEAST_PILOT_POSITIONS = 2048
# Fewer for dense targets, all of which are held in memory: 100 MB at V = 200k.
_DENSE_PILOT_POSITIONS = 128
# Tokens of the corpus by which ids that are equally frequent in the pilot are ordered.
_TEXT_POSITIONS = 1 << 20


class SetRanks:
    """The rank table of one segment set, read when it exists; thread-safe."""

    def __init__(self, record: SpecRecord) -> None:
        self._record = record
        self._found: RankTable | None = None

    def read(self) -> RankTable | None:
        """Read the stored table; None when there is none yet.

        Raises:
            FormatError: this version cannot read the record. CorruptSegment: it is not the table that was recorded.
        """
        if self._found is None:
            record = read_record(self._record.root, f"{self._record.path}/ranks.json", "ranks")
            self._found = None if record is None else self._read_table(record)
        return self._found

    def table(self) -> RankTable:
        """The table that segments are written with: the stored one, or a plain one for a set that stores no ids.

        Raises:
            CorruptSegment: the stored table is missing. Others as `read`.
        """
        if not self._record.stores_ids:
            return RankTable.plain(self._record.spec.identity.vocab_size)
        table = self.read()
        if table is None:
            path = self._record.path
            raise CorruptSegment(f"{path}/ranks.json is missing, and its segments were written with a rank table")
        return table

    def lack(self) -> bool:
        """Tell whether the set stores ids and has no table for them yet."""
        return self._record.stores_ids and self.read() is None

    def make(self, pilot: Targets) -> None:
        """Make the table of a set that stores ids from the pilot rows' targets, unless another writer was faster.

        The id that is most frequent among the pilot's top-k ids and draws gets rank 0; ties go by the corpus' tokens.

        Raises:
            TeacherFailed: an id is over the vocabulary. StoreError: the store is full or cannot be written.
        """
        ids: NDArray[np.uint32] = pilot.ids.reshape(-1)
        if pilot.draws is not None:
            ids = np.concatenate([ids, pilot.draws.ids])
        corpus, vocab_size = self._record.corpus, self._record.spec.identity.vocab_size
        highest = int(ids.max(initial=0))
        if highest >= vocab_size:
            raise TeacherFailed(f"the teacher answered id {highest}, its vocabulary has {vocab_size}")
        tokens = corpus.tokens(0, min(corpus.num_positions, _TEXT_POSITIONS))
        self._record.publish()
        self._create(RankTable.by_frequency(ids, tokens, vocab_size))

    def _create(self, table: RankTable) -> None:
        root, group = self._record.root, attempt_name("ranks")
        path = f"{self._record.path}/{group}"
        with removed_on_failure(root, path):
            writer = GroupWriter(root, path)
            writer.write("ids_by_rank", table.ids_by_rank, Layout((1 << 16,)))
            objects = writer.finish()
        record = {"group": group, "sha256": table.sha256, "objects": objects}
        # Whoever creates the record first decides: all segments of a set must have the same ranks.
        if not publish(root, f"{self._record.path}/ranks.json", record_bytes("ranks", record), path, objects):
            root.delete(path)

    def _read_table(self, record: Record) -> RankTable:
        path, vocab_size = self._record.path, self._record.spec.identity.vocab_size
        with values_read(f"{path}/ranks.json is not the record of a rank table"):
            group = check_name("rank table", record["group"])
            objects = objects_from_json(record["objects"])
            expected = str(record["sha256"])
        reader = GroupReader(self._record.root, f"{path}/{group}", objects)
        reader.expect("ids_by_rank", (vocab_size,), ("uint32",))
        table = RankTable(reader.read_all("ids_by_rank").astype(np.uint32, copy=False))
        if table.sha256 != expected or not np.array_equal(np.sort(table.ids_by_rank), np.arange(vocab_size)):
            raise CorruptSegment(f"{reader.path}/ids_by_rank is not the permutation that ranks.json recorded")
        return table


def pilot_rows(corpus: Corpus, fields: Fields) -> list[int]:
    """Choose rows at even distances with about as many positions as a rank table needs; at least one row."""
    most = _DENSE_PILOT_POSITIONS if fields.dense else _PILOT_POSITIONS
    # Nothing is kept before the pilot is scored, so of a small corpus it is a small part.
    wanted = min(most, max(_LEAST_PILOT_POSITIONS, corpus.num_positions // 16))
    count = max(1, min(len(corpus), wanted * len(corpus) // corpus.num_positions))
    rows = np.arange(count, dtype=np.int64) * len(corpus) // count
    return [int(row) for row in rows]
