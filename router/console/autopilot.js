// What an autopilot beside the router decided, why, and what came of it.

import { $, clock, h, keyed, percent, seconds, setText } from "./dom.js";

const SILENCE = 60; // seconds: longer than any look takes

const pools = ({ prefill, decode }) => `${prefill}P${decode}D`;
const unix = (time) => Date.parse(time) / 1000;

export class Autopilot {
  constructor() {
    this.report = null; // the last one; null: none has come
  }

  // From each poll.
  show({ autopilot }) {
    this.report = autopilot;
    $("autopilot").hidden = autopilot === null;
    if (autopilot === null) return;
    const { mode, slo, interval, age, decisions } = autopilot;
    const silent = age > interval + SILENCE;
    setText($("autopilot-mode"), silent ? "Silent" : mode === "on" ? "On" : "Dry run");
    $("autopilot-mode").className = silent ? "pill bad" : mode === "on" ? "pill good" : "pill";
    setText($("autopilot-aim"), [
      `Aims at ${percent(slo.attainment, 0)} of requests within TTFT ${seconds(slo.ttft)} and TPOT ${seconds(slo.tpot)}.`,
      mode === "on" ? "" : "It changes nothing, and tells what it would change.",
      silent ? `It has not reported since ${clock(Date.now() / 1000 - age)}.` : "",
    ].join(" "));
    $("no-decisions").hidden = decisions.length > 0;
    keyed($("decisions").tBodies[0], decisions, ({ time }) => time, row,
      (element, decision) => update(element, decision, slo));
  }

  // When it changed the pools, in Unix seconds.
  changes() {
    return (this.report?.decisions ?? []).filter(({ done }) => done).map(({ time }) => unix(time));
  }
}

function row({ time, present, wanted, reason, done, error }) {
  const why = h("div", { class: "quiet" }, reason);
  const trouble = error && h("div", { class: "late" }, error);
  return h("tr", {}, h("td", { class: "quiet", title: time }, clock(unix(time))),
    h("td", { class: "change" }, changed(present, wanted), why, trouble),
    h("td", { class: error ? "wide late" : "wide" }, done ? "changed" : error ? "failed" : "only told"),
    h("td", { class: "wide" }), h("td"));
}

function changed(present, wanted) {
  const [before, after] = [present, wanted].map((one) => one.local_prefill_tokens ?? 0);
  const parts = [];
  if (pools(present) !== pools(wanted)) parts.push(`${pools(present)} → ${pools(wanted)}`);
  if (before !== after) parts.push(`prompts on decode up to ${before} → ${after} tokens`);
  return parts.join(", ");
}

function update(element, { predicted, judged, outcome }, { attainment }) {
  const [, , , promised, measured] = element.cells;
  setText(promised, percent(predicted));
  setText(measured, judged === null ? "not yet" : outcome === null ? "no request" : percent(outcome));
  measured.classList.toggle("late", outcome !== null && outcome < attainment);
  measured.classList.toggle("quiet", outcome === null);
}
