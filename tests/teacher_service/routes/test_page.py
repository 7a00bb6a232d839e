"""The page at `/`, in a real browser on a real service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from potstill.cache import Cache
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.types import Targets
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.app import create_app
from potstill.teacher_service.hosting.service import Service
from tests.support import http
from tests.support.corpora import make_corpus, plan_targets, teacher_for
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.paths import ROOT
from tests.support.pools import hosted_pool
from tests.support.processes.browser import Page, browsing, find_chromium
from tests.support.processes.servers import hosted, serving, serving_teachers, wait_ready

HOSTILE = "<img src=x onerror=alert(1)>&amp;'\""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine; Debian's package is called chromium")
    with browsing(chromium) as tab:
        yield tab


@contextmanager
def looking_at(page: Page, url: str, *, teachers: int = 1, complains: str = "") -> Iterator[Page]:
    """The page of a service, once its teachers are there; then it must have complained of nothing but `complains`."""
    page.open(url)
    page.trouble.clear()
    page.until(
        f"location.href === '{url}/' && document.querySelectorAll('#teachers tr').length", lambda n: n == teachers
    )
    yield page
    page.open("about:blank")
    page.until("location.href === 'about:blank'")
    assert [line for line in page.trouble if not complains or complains not in line] == []


@pytest.fixture
def half(tmp_path: Path) -> tuple[Cache, Corpus]:
    """The corpus `docs`, of which the first shard and each third have targets."""
    cache, corpus = make_corpus(tmp_path / "cache", shard_positions=250)
    for shard in range(0, corpus.num_shards, 3):
        commit(cache, corpus, shard)
    return cache, corpus


def commit(cache: Cache, corpus: Corpus, shard: int) -> None:
    teacher = teacher_for(corpus)
    rows = corpus.rows(int(corpus.shard_rows[shard]), int(corpus.shard_rows[shard + 1]))
    targets = Targets.concat([teacher.distribution(row, 16) for row in rows])
    plan_targets(cache, teacher).write_shard(shard, targets, teacher.provenance)


def text_of(name: str, what: str) -> str:
    """JavaScript for the text of `what` in the row of a teacher."""
    find = (
        f"[...document.querySelectorAll('#teachers tr')].find(r => r.querySelector('.name').textContent === {name!r})"
    )
    return f"{find}?.querySelector({what!r})?.textContent"


def test_the_page_shows_teachers_and_scales_one(page: Page) -> None:
    with (
        serving_teachers(hosted_pool("big", FakeTeacher(), start_seconds=5), hosted("fixed", FakeTeacher())) as url,
        looking_at(page, url, teachers=2),
    ):
        assert page.run(text_of("big", ".ready")) == "1 of 1"
        assert page.run(text_of("big", ".badge")) == "ready"
        assert page.run("document.querySelector('[aria-label=\"Replicas of fixed\"]').disabled") is True
        field = "[aria-label='Replicas of big']"
        page.run(f'document.querySelector("{field}").select()')
        page.press("3")
        page.click("[aria-label='Scale big']")
        page.until(text_of("big", ".ready"), lambda text: text == "1 of 3")
        page.until(text_of("big", ".ready"), lambda text: text == "3 of 3")
        assert http.get(f"{url}/v1/teachers/big/replicas").json()["target"] == 3
        assert page.run("document.querySelectorAll('#teachers tr:first-child .replicas li').length") == 3


def test_a_number_that_is_refused_is_explained_beside_it(page: Page) -> None:
    # Chromium itself notes every answer that is an error.
    with serving_teachers(hosted_pool("big", FakeTeacher(), most=4)) as url, looking_at(page, url, complains="422"):
        page.run("document.querySelector('.scale input').max = 99")
        page.run("document.querySelector('.scale input').select()")
        page.press("9")
        page.run("document.querySelector('.scale').requestSubmit()")
        page.until("document.querySelector('.answer').textContent", lambda text: "9 replicas are over the 4" in text)
        assert page.run("document.querySelector('.scale input').value") == "9"


def test_the_heat_map_is_what_is_committed(page: Page, half: tuple[Cache, Corpus]) -> None:
    cache, corpus = half
    cells = "[...document.querySelectorAll('.heat .cell')].map(cell => Number(cell.dataset.fraction))"

    def shown() -> list[float]:
        return [float(done) for done in cache.targets("fake", "docs").committed]

    with serving_teachers(hosted("fake", FakeTeacher()), cache=cache) as url, looking_at(page, url):
        page.until(cells, lambda found: found == shown())
        assert page.run("document.querySelector('.corpus .name').textContent") == "docs"
        assert sum(shown()) == -(-corpus.num_shards // 3)
        commit(cache, corpus, 1)
        page.until(cells, lambda found: found == shown() and found[1] == 1.0)
        assert page.run("document.querySelector('.strip .amount').textContent").endswith(f"of {corpus.num_shards}")


def test_hostile_names_are_text(page: Page) -> None:
    teacher = FakeTeacher(fake_identity(model=HOSTILE))
    with serving_teachers(hosted_pool(HOSTILE, teacher)) as url, looking_at(page, url):
        assert page.run("document.querySelector('#teachers .name').textContent") == HOSTILE
        assert page.run("document.querySelector('#teachers .model').textContent").startswith(HOSTILE)
        assert page.run("document.querySelectorAll('img').length") == 0


def test_rates_and_hits_are_drawn_while_rows_are_scored(page: Page) -> None:
    with serving_teachers(hosted_pool("big", FakeTeacher())) as url, looking_at(page, url):
        http.post(f"{url}/v1/teachers/big/score", json={"rows": [[1, 2, 3]] * 100, "fields": {"k": 2}})
        page.until("document.querySelector('.figure .value').textContent", lambda text: text[0] in "123456789")
        page.until("document.querySelector('.figure .line').getAttribute('d')", lambda path: "L" in path)
        assert "300 scored" in page.run(text_of("big", ".tokens"))


def test_it_says_when_the_service_is_gone_and_when_it_is_back(page: Page) -> None:
    app = create_app(Service([hosted("smol", FakeTeacher())]))
    state = "document.querySelector('#connection').dataset.state"
    with serving(app) as url:
        wait_ready(url)
        port = int(url.rpartition(":")[2])
        page.open(url)
        page.until("document.querySelectorAll('#teachers tr').length", lambda count: count == 1)
    page.until(state, lambda value: value == "failed")
    assert "does not answer" in page.run("document.querySelector('#connection').textContent")
    assert page.run("document.querySelectorAll('#teachers tr').length") == 1
    with serving(create_app(Service([hosted("other", FakeTeacher())])), port=port):
        page.until(state, lambda value: value == "live", seconds=60)
        page.until(text_of("other", ".badge"), lambda text: text == "ready")


def test_nothing_moves_when_news_come(page: Page) -> None:
    """Layout shifts, as the browser itself counts them, once the first answer is drawn."""
    with (
        serving_teachers(hosted_pool("big", FakeTeacher(), start_seconds=5), hosted("fixed", FakeTeacher())) as url,
        looking_at(page, url, teachers=2),
    ):
        # The answer is in the document; what it moved is counted when the next frame is drawn.
        page.run("(() => { requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn = true })) })()")
        page.until("window.drawn === true")
        page.run(
            "(() => { window.shifts = []; const moved = entry => entry.sources.map(s => s.node?.outerHTML);"
            "new PerformanceObserver(list => window.shifts.push(...list.getEntries().map(moved)))"
            ".observe({type: 'layout-shift'}) })()"
        )
        polls = "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/v1/overview')).length"
        seen = page.run(polls)
        http.post(f"{url}/v1/teachers/big/score", json={"rows": [[1, 2, 3]] * 100, "fields": {"k": 2}})
        page.until(polls, lambda count: count >= seen + 6)
        assert page.run("window.shifts") == []


def test_every_control_has_a_name(page: Page) -> None:
    with serving_teachers(hosted_pool("big", FakeTeacher())) as url, looking_at(page, url):
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        controls = [node for node in tree if node.get("role", {}).get("value") in ("button", "spinbutton", "textbox")]
        names = [node["name"]["value"] for node in controls]
        assert names == ["API key", "Replicas of big", "Scale big"]


def test_a_key_is_asked_for_used_and_kept_in_the_tab(page: Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    trainer, admin = (add_key(keys, role.value, role, Quota()) for role in (Role.TRAINER, Role.ADMIN))
    dialog = "document.querySelector('#key-dialog')?.open"

    def give(key: str) -> None:
        page.until(dialog)
        page.press(key)
        page.run("document.querySelector('#key-form').requestSubmit()")

    with serving_teachers(hosted_pool("big", FakeTeacher()), access=Access(KeyRing(keys))) as url:
        page.open(url)
        give("wrong")
        page.until("document.querySelector('#key-trouble').textContent", lambda text: "not known" in text)
        give(trainer)
        page.until("document.querySelectorAll('#teachers tr').length", lambda count: count == 1)
        page.run("document.querySelector('.scale').requestSubmit()")
        page.until("document.querySelector('.answer').textContent", lambda text: "needs the role admin" in text)
        page.click("#key-button")
        give(admin)
        page.run("document.querySelector('.scale').requestSubmit()")
        page.until("document.querySelector('.answer').textContent", lambda text: text == "1 wanted")
        assert page.run("Object.values(sessionStorage)") == [admin]
        assert page.run("localStorage.length + document.cookie.length") == 0
        page.open("about:blank")


def test_a_key_that_no_header_can_hold_is_refused_and_never_sent(page: Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    key = add_key(keys, "ann", Role.TRAINER, Quota())
    dialog, trouble = (
        "document.querySelector('#key-dialog')?.open",
        "document.querySelector('#key-trouble').textContent",
    )

    def give(text: str) -> None:
        page.run(f"document.querySelector('#key-input').value = {json.dumps(text)}")
        page.run("document.querySelector('#key-form').requestSubmit()")

    with serving_teachers(hosted("smol", FakeTeacher()), access=Access(KeyRing(keys))) as url:
        page.open(url)
        page.until(dialog)
        give(key[:12] + "…")
        page.until(trouble, lambda text: "characters that no key has" in text)
        assert page.run(dialog) is True
        assert page.run("sessionStorage.length") == 0
        # One that is there all the same, from whatever page was here before, is none.
        page.run("sessionStorage.setItem('potstill.key', 'pot\u2026')")
        page.run("(() => { window.before = true; location.reload() })()")
        page.until("window.before === undefined && document.querySelector('#key-dialog')?.open")
        assert page.run(trouble) == ""
        give(key)
        page.until("document.querySelectorAll('#teachers tr').length", lambda count: count == 1)
        page.open("about:blank")


def test_a_corpus_that_cannot_be_read_is_told_in_its_place(page: Page, half: tuple[Cache, Corpus]) -> None:
    cache, _ = half
    make_corpus(Path(cache.root.url), name="bad")
    (Path(cache.root.url) / "corpora" / "bad" / "zarr.json").write_text("{")
    shown = "[...document.querySelectorAll('.corpus')].map(corpus => corpus.querySelector('h3').textContent)"
    with serving_teachers(hosted("fake", FakeTeacher()), cache=cache) as url, looking_at(page, url):
        bad, good = page.until(shown, lambda found: len(found) == 2)
        assert bad.startswith("badcannot be read: corpora/bad/zarr.json is not JSON")
        assert good.startswith("docs")
        assert "cannot be read" not in good


def test_the_page_is_served_with_a_strict_policy() -> None:
    with serving_teachers(hosted("smol", FakeTeacher())) as url:
        reply = http.get(url)
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]
        again = http.get(url, headers={"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert http.get(f"{url}/static/page.js").headers["content-type"].startswith("text/javascript")
        for bad in ("nothing.js", "..%2fpage.py", "%00"):
            assert http.get(f"{url}/static/{bad}").status_code == 404


def test_the_page_asks_nobody_else() -> None:
    folder = ROOT / "teacher_service" / "static"
    for path in folder.iterdir():
        addresses = [word for word in path.read_text().split() if "://" in word and "www.w3.org" not in word]
        assert addresses == [], path


def test_the_overview_has_everything(half: tuple[Cache, Corpus]) -> None:
    cache, corpus = half
    with serving_teachers(hosted_pool("big", FakeTeacher(), replicas=2), cache=cache) as url:
        http.post(f"{url}/v1/teachers/big/score", json={"rows": [[1, 2, 3]], "fields": {"k": 2}})
        http.get(f"{url}/v1/teachers/nobody")
        found = http.get(f"{url}/v1/overview").json()
    assert found["ready"] is True
    assert found["refusals"] == 1
    assert found["coverage"][0]["corpus"] == "docs"
    assert len(found["coverage"][0]["teachers"][0]["cells"]) == corpus.num_shards
    (big,) = found["teachers"]
    assert (big["name"], big["state"], big["tokens"], big["capture_path"]) == ("big", "ready", 3, "fake")
    assert (big["replicas"]["replicas"], big["replicas"]["max"]) == (2, 4)
