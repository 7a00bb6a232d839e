// The loop: ask the service, show what it says, wait; longer and longer while it does not answer.

import { compact, HeatStrip, History, LineChart, percent } from "./charts.js";
import { element, say, Views } from "./elements.js";
import { hasKey, overview, Refused, scale, setKey, Unreachable } from "./service.js";
import { TeacherView } from "./teachers.js";

const POLL_MS = 2000;
const LONGEST_POLL_MS = 30000;

const $ = (id) => document.getElementById(id);

class Figure {
  constructor(title, top) {
    this.top = top;
    this.history = new History();
    this.chart = new LineChart(title);
    this.value = element("span", { className: "value", text: "–" });
    this.more = element("span", { className: "more" });
    const words = element("div", { className: "words" }, this.value, this.more);
    this.element = element("div", { className: "figure" }, element("h3", { text: title }), words, this.chart.element);
  }

  show(clock, value, text, more = "") {
    this.history.add(clock, value);
    say(this.value, text);
    say(this.more, more);
    this.chart.draw(this.history, this.top, text);
  }
}

class CorpusView {
  constructor(corpus) {
    this.counts = element("span", { className: "more" });
    const title = element("h3", {}, element("span", { className: "name", text: corpus.corpus }), this.counts);
    this.teachers = new Views(element("div", { className: "strips" }), (teacher) => new StripView(teacher));
    this.element = element("div", { className: "corpus" }, title, this.teachers.container);
  }

  show(corpus) {
    const count = (value, word) => `${compact(value)} ${word}${value === 1 ? "" : "s"}`;
    const counts = [count(corpus.positions, "position"), count(corpus.rows, "row"), count(corpus.shards, "shard")];
    const none = corpus.teachers.length ? "" : "; no teacher has targets yet";
    say(this.counts, corpus.error ? `cannot be read: ${corpus.error}` : `${counts.join(", ")}${none}`);
    const strips = corpus.teachers.map((teacher) => ({ ...teacher, corpus: corpus.corpus, shards: corpus.shards }));
    this.teachers.show(strips, (strip) => strip.teacher);
  }
}

class StripView {
  constructor(strip) {
    this.heat = new HeatStrip();
    this.amount = element("span", { className: "amount" });
    this.element = element("div", { className: "strip" }, element("span", { className: "name", text: strip.teacher }));
    this.element.append(this.heat.element, this.amount);
  }

  show(strip) {
    const amount = strip.error || `${percent(strip.committed / strip.shards)} · ${strip.committed} of ${strip.shards}`;
    say(this.amount, amount);
    this.amount.title = amount;
    this.heat.draw(strip.cells, strip.shards, `${strip.teacher} has ${amount} shards of ${strip.corpus}`);
  }
}

const figures = {
  tokens: new Figure("Tokens answered per second"),
  hits: new Figure("Hit rate", 1),
  queue: new Figure("Tokens waiting"),
  refusals: new Figure("Refusals per second"),
};
$("figures").append(...Object.values(figures).map((figure) => figure.element));
const teachers = new Views($("teachers"), ({ teacher }) => new TeacherView(teacher, scaleAndLook));
const corpora = new Views($("coverage"), (corpus) => new CorpusView(corpus));

let before = null;

function show(now) {
  // A clock that went back is another process: its counters begin at zero.
  if (before !== null && now.clock < before.clock) before = null;
  const seconds = before === null ? null : now.clock - before.clock;
  const rate = (value, old) => (seconds ? Math.max(0, value - (old ?? 0)) / seconds : null);
  const old = new Map((before?.teachers ?? []).map((teacher) => [teacher.name, teacher]));
  const each = now.teachers.map((teacher) => {
    const was = old.get(teacher.name);
    const tokensPerSecond = rate(teacher.tokens, was?.tokens);
    return { teacher, clock: now.clock, tokensPerSecond, hitRate: hitRate(teacher.rows) };
  });
  const total = seconds ? each.reduce((sum, { tokensPerSecond }) => sum + tokensPerSecond, 0) : null;
  figures.tokens.show(now.clock, total, compact(total), `${compact(figures.tokens.history.highest)} at most lately`);
  showHits(now, old);
  const { tokens_waiting: waiting, tokens_in_flight: inFlight } = now.queue;
  figures.queue.show(now.clock, waiting, compact(waiting), `${compact(inFlight)} being scored`);
  const refused = rate(now.refusals, before?.refusals);
  figures.refusals.show(now.clock, refused, compact(refused), `${compact(now.refusals)} since the start`);
  teachers.show(each, ({ teacher }) => teacher.name);
  showCoverage(now);
  before = now;
}

function hitRate(rows, was = null) {
  if (rows === null) return null;
  const hits = rows.hits - (was?.hits ?? 0);
  const all = hits + rows.misses + rows.joined - (was === null ? 0 : was.misses + was.joined);
  return all > 0 ? hits / all : null;
}

function showHits(now, old) {
  const sum = (list) => {
    const kept = list.map((teacher) => teacher.rows).filter((rows) => rows !== null);
    const add = (key) => kept.reduce((total, rows) => total + rows[key], 0);
    return kept.length ? { hits: add("hits"), misses: add("misses"), joined: add("joined") } : null;
  };
  const total = sum(now.teachers);
  const lately = hitRate(total, sum(now.teachers.map((teacher) => old.get(teacher.name) ?? { rows: null })));
  const since = hitRate(total);
  figures.hits.show(now.clock, lately, percent(lately ?? since), total ? `${percent(since)} since the start` : "no cache");
}

function showCoverage({ coverage, coverage_error: trouble }) {
  const note = $("coverage-note");
  say(note, trouble || (coverage === null ? "reading" : coverage.length ? "" : "no corpus in this cache"));
  note.dataset.state = trouble ? "failed" : "";
  if (coverage !== null) corpora.show(coverage, (corpus) => corpus.corpus);
}

let timer = null;
let pause = POLL_MS;
let asking = false;
let askedForKey = false;

async function look() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  try {
    const now = await answered();
    if (now !== null) show(now);
  } finally {
    asking = false;
    timer = setTimeout(look, pause);
  }
}

// The service's overview, or null after saying why there is none.
async function answered() {
  try {
    const now = await overview();
    pause = POLL_MS;
    askedForKey = false;
    connection("live", "live");
    return now;
  } catch (error) {
    pause = Math.min(pause * 2, LONGEST_POLL_MS);
    fail(error);
    return null;
  }
}

function fail(error) {
  const again = `; next try in ${pause / 1000} s`;
  if (error instanceof Unreachable) {
    connection("failed", `the service does not answer (${error.message})${again}`);
  } else if (error instanceof Refused && error.status === 401) {
    connection("failed", "an API key is needed");
    if (!askedForKey) askForKey(hasKey() ? error.message : "");
    askedForKey = true;
  } else {
    connection("failed", `${error.message}${again}`);
  }
}

function connection(state, text) {
  $("connection").dataset.state = state;
  $("connection").title = text;
  document.body.classList.toggle("stale", state !== "live");
  say($("connection"), text);
}

async function scaleAndLook(name, replicas) {
  try {
    return await scale(name, replicas);
  } catch (error) {
    if (error instanceof Refused && error.status === 401) askForKey(error.message);
    throw error;
  } finally {
    look();
  }
}

function askForKey(trouble) {
  if ($("key-dialog").open) return;
  say($("key-trouble"), trouble);
  $("key-input").value = "";
  $("key-dialog").showModal();
}

$("key-button").addEventListener("click", () => askForKey(""));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const trouble = setKey($("key-input").value.trim());
  say($("key-trouble"), trouble);
  if (trouble) return;
  askedForKey = false;
  $("key-dialog").close();
  pause = POLL_MS;
  look();
});
look();
