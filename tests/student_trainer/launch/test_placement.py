"""Placement of workers on nodes: as large as fits on each node, or refused at once."""

from __future__ import annotations

import pytest

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.launch.placement import Node, Placement, place, place_some


def nodes(*cpus: float, gpus: float = 0) -> list[Node]:
    return [Node(f"node-{i}", each, gpus) for i, each in enumerate(cpus)]


@pytest.mark.parametrize(
    ("cpus", "workers", "each"),
    [
        ((8,), 1, 8),
        ((8,), 3, 2),
        ((8, 8), 2, 8),
        ((1, 1, 2), 2, 1),  # 4 CPUs for 2 workers, but only one node has 2
        ((4, 4, 4), 2, 4),
        ((3, 3, 3), 4, 1),
        ((6, 3, 3), 4, 3),
        ((0, 2.5), 1, 2),  # a head without resources
    ],
)
def test_workers_get_as_many_cpus_as_fit_on_the_nodes(cpus: tuple[float, ...], workers: int, each: int) -> None:
    assert place(nodes(*cpus), workers, "auto") == Placement(cpus=each, gpu=False)


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_a_gpu_for_each_worker_or_a_refusal(device: str) -> None:
    assert place(nodes(8, 8, gpus=2), 4, device) == Placement(cpus=1, gpu=True)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidInput, match=r"^5 workers .* 2 nodes \(node-0 8 CPUs and 2 GPUs, .*room for 4 with a GPU"
    ):
        place(nodes(8, 8, gpus=2), 5, device)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match='room for 1 with a GPU and a CPU each; .*train.device to "cpu"'):
        place(nodes(1, gpus=4), 2, device)  # type: ignore[arg-type]


def test_cpus_where_there_are_gpus_only_when_asked_for() -> None:
    assert place(nodes(8, 8, gpus=2), 5, "cpu") == Placement(cpus=2, gpu=False)
    with pytest.raises(InvalidInput, match="room for 0"):
        place(nodes(8), 1, "gpu")


@pytest.mark.parametrize(("cpus", "workers"), [((), 1), ((0,), 1), ((0.5, 0.5), 1), ((1, 1), 3)])
def test_what_has_no_place_is_told_in_one_line(cpus: tuple[float, ...], workers: int) -> None:
    with pytest.raises(InvalidInput, match="cannot be placed on .* lower train.workers, or add nodes") as caught:
        place(nodes(*cpus), workers, "auto")
    assert "\n" not in str(caught.value)


def test_of_many_nodes_some_are_named() -> None:
    with pytest.raises(InvalidInput, match="node-7 1 CPUs and 0 GPUs and 12 more"):
        place(nodes(*[1.0] * 20), 21, "auto")


def test_as_many_as_fit_have_a_place() -> None:
    assert place_some(nodes(1, 1, 2), (1, 5), "cpu") == place(nodes(1, 1, 2), 4, "cpu")
    assert place_some(nodes(4, 4), (1, 2), "cpu") == Placement(cpus=4, gpu=False)
    with pytest.raises(InvalidInput, match="^3 workers cannot be placed"):
        place_some(nodes(1, 1), (3, 5), "cpu")
