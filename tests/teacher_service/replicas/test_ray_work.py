"""Which calls shared a replica, whichever came first, and what is kept of replicas that are gone."""

from __future__ import annotations

from potstill.teacher_service.replicas.ray_work import Work


def test_calls_that_meet_on_a_replica_were_not_alone_though_one_leaves() -> None:
    work = Work()
    first = work.begin("a", 5)
    assert first.alone
    second = work.begin("a", 7)
    elsewhere = work.begin("b", 1)
    second.end()
    assert (first.alone, second.alone, elsewhere.alone) == (False, False, True)
    assert (work.waiting["a"], work.waiting["b"]) == (5, 1)
    first.end()
    assert work.begin("a", 3).alone


def test_a_call_that_went_to_another_replica_is_alone_by_who_is_there() -> None:
    work = Work()
    chosen, waiting = work.begin("", 5), work.begin("", 7)
    assert (chosen.alone, waiting.alone) == (False, False)
    assert chosen.move("a") == "a"
    assert (chosen.alone, work.waiting["a"], work.waiting[""]) == (True, 5, 7)
    waiting.move("a")
    assert (chosen.alone, waiting.alone, work.waiting["a"]) == (False, False, 12)
    chosen.move("a")
    assert not chosen.alone


def test_a_replica_that_is_gone_is_forgotten_once_it_has_nothing_to_answer() -> None:
    work = Work()
    call = work.begin("a", 5)
    work.scored["a"] += 9
    work.crashed |= {"a", "b"}
    work.forget({"b"})
    assert (work.waiting["a"], work.scored["a"], work.crashed) == (5, 9, {"b"})
    call.end()
    work.forget({"b"})
    assert not work.waiting
    assert not work.scored
    assert not work._calls
