"""Targets encoded and decoded again: what a read of the stored ones gives."""

from __future__ import annotations

from potstill.cache.encoding.fields import decode_fields, encode_fields
from potstill.cache.encoding.logprobs import Encoding, EncodingError, Measured, RankTable, decode, encode
from potstill.cache.types import Fields, Targets


def round_trip(targets: Targets, encoding: Encoding, ranks: RankTable) -> Targets:
    return decode(encode(targets, encoding, ranks), encoding, ranks)


def round_trip_fields(targets: Targets, fields: Fields, encoding: Encoding, ranks: RankTable) -> Targets:
    """Without the top-k."""
    stored = encode_fields(targets, fields, encoding, ranks)
    everything = range(targets.num_positions)
    return decode_fields(
        lambda name, start, stop: stored[name][start:stop], everything, fields, encoding, ranks, targets.num_positions
    )


def measure_error(exact: Targets, decoded: Targets) -> EncodingError:
    """Both have the same ids."""
    measured = Measured()
    measured.add(exact, decoded)
    return measured.error()
