// One table row a teacher: how it is, how fast it is, its replicas and the control that scales them.

import { compact, History, LineChart, percent } from "./charts.js";
import { element, say, Views } from "./elements.js";

// Where a teacher's targets are computed, and what that means.
const CAPTURE_PATHS = {
  sampler: "Targets are computed where the engine's logits are: the fastest path, with all fields.",
  arrays: "The engine's top-k logprobs are taken as arrays before it makes its answer: top-k only.",
  "public-flat": "The top-k is read from the engine's public answers: the slowest path, top-k only.",
};

export class TeacherView {
  // `onScale(name, replicas)` returns a promise; what it is rejected with is shown at the control.
  constructor(teacher, onScale) {
    this.name = teacher.name;
    this.history = new History();
    this.chart = new LineChart("Tokens per second");
    this.model = element("span", { className: "model" });
    this.capture = element("span", { className: "model" });
    this.state = element("span", { className: "badge" });
    this.cause = element("span", { className: "cause" });
    this.rate = element("td", { className: "number" });
    this.hits = element("td", { className: "number" });
    this.waiting = element("td", { className: "number" });
    this.ready = element("td", { className: "number ready" });
    this.replicas = new Views(element("ul", { className: "replicas" }), () => new ReplicaView());
    this.control = new ScaleControl(teacher.name, onScale);
    const title = element("th", { scope: "row" }, element("span", { className: "name", text: teacher.name }), this.model, this.capture);
    this.element = element(
      "tr",
      {},
      title,
      element("td", { className: "state" }, this.state, this.cause, this.replicas.container),
      this.rate,
      element("td", { className: "chart-column" }, this.chart.element),
      this.hits,
      this.waiting,
      this.ready,
      element("td", {}, this.control.element),
    );
  }

  show({ teacher, clock, tokensPerSecond, hitRate }) {
    const status = teacher.replicas;
    this.history.add(clock, tokensPerSecond);
    this.chart.draw(this.history, null, compact(tokensPerSecond));
    say(this.model, teacher.model);
    say(this.capture, teacher.capture_path ? `capture path: ${teacher.capture_path}` : "");
    this.capture.title = CAPTURE_PATHS[teacher.capture_path] ?? "";
    say(this.state, teacher.state);
    this.state.dataset.state = teacher.state;
    const trouble = teacher.cause || (teacher.store_error && `not kept: ${teacher.store_error}`);
    say(this.cause, trouble);
    this.cause.title = trouble;
    say(this.rate, compact(tokensPerSecond));
    say(this.hits, percent(hitRate));
    const each = status?.each ?? [];
    say(this.waiting, teacher.queue ? compact(teacher.queue.tokens_waiting) : "–");
    say(this.ready, status ? `${status.replicas} of ${status.target}` : "–");
    this.replicas.show(each, (replica) => replica.name);
    this.control.show(status);
  }
}

class ReplicaView {
  constructor() {
    this.name = element("span", { className: "name" });
    this.state = element("span", { className: "badge" });
    this.tokens = element("span", { className: "tokens" });
    this.element = element("li", {}, this.name, this.state, this.tokens);
  }

  show(replica) {
    say(this.name, replica.name);
    say(this.state, replica.state);
    this.state.dataset.state = replica.state;
    say(this.tokens, `${compact(replica.tokens_waiting)} being scored, ${compact(replica.tokens_scored)} scored`);
  }
}

class ScaleControl {
  constructor(name, onScale) {
    this.name = name;
    this.onScale = onScale;
    this.typed = false;
    this.input = element("input", { type: "number", "aria-label": `Replicas of ${name}`, required: "" });
    this.button = element("button", { type: "submit", text: "Scale", "aria-label": `Scale ${name}` });
    this.answer = element("output", { className: "answer" });
    this.element = element("form", { className: "scale" }, this.input, this.button, this.answer);
    this.input.addEventListener("input", () => (this.typed = true));
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
  }

  show(status) {
    const fixed = !status || status.max <= status.min;
    this.input.disabled = this.button.disabled = fixed || this.sending === true;
    this.element.title = status && fixed ? "This teacher runs inside the service; more replicas need Ray." : "";
    if (!status) return;
    this.input.min = status.min;
    this.input.max = status.max;
    if (!this.typed) this.input.value = status.target;
  }

  async send() {
    const wanted = this.input.valueAsNumber;
    this.sending = this.button.disabled = true;
    this.answer.dataset.state = "waiting";
    say(this.answer, `asking for ${wanted}`);
    try {
      const status = await this.onScale(this.name, wanted);
      this.typed = false;
      this.answer.dataset.state = "done";
      say(this.answer, `${status.target} wanted`);
    } catch (error) {
      this.answer.dataset.state = "failed";
      say(this.answer, error.message);
    } finally {
      this.sending = this.button.disabled = false;
    }
  }
}
