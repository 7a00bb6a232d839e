"""Which calls shared a replica, whichever came first, and what is kept of replicas that are gone."""

from __future__ import annotations

from potstill.teacher_service.replicas.ray_in_flight import CallsInFlight


def test_calls_that_meet_on_a_replica_were_not_alone_though_one_leaves() -> None:
    calls = CallsInFlight()
    first = calls.begin("a", 5)
    assert first.alone
    second = calls.begin("a", 7)
    elsewhere = calls.begin("b", 1)
    second.end()
    assert (first.alone, second.alone, elsewhere.alone) == (False, False, True)
    assert (calls.waiting["a"], calls.waiting["b"]) == (5, 1)
    first.end()
    assert calls.begin("a", 3).alone


def test_a_call_that_went_to_another_replica_is_alone_by_who_is_there() -> None:
    calls = CallsInFlight()
    chosen, waiting = calls.begin("", 5), calls.begin("", 7)
    assert (chosen.alone, waiting.alone) == (False, False)
    assert chosen.move("a") == "a"
    assert (chosen.alone, calls.waiting["a"], calls.waiting[""]) == (True, 5, 7)
    waiting.move("a")
    assert (chosen.alone, waiting.alone, calls.waiting["a"]) == (False, False, 12)
    chosen.move("a")
    assert not chosen.alone


def test_a_replica_that_is_gone_is_forgotten_once_it_has_nothing_to_answer() -> None:
    calls = CallsInFlight()
    call = calls.begin("a", 5)
    calls.scored["a"] += 9
    calls.crashed |= {"a", "b"}
    calls.forget({"b"})
    assert (calls.waiting["a"], calls.scored["a"], calls.crashed) == (5, 9, {"b"})
    call.end()
    calls.forget({"b"})
    assert not calls.waiting
    assert not calls.scored
    assert not calls._calls
