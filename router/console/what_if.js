// What other pools, another rate or another objective would give: predicted, beside what was
// measured. And making it so.

import { call } from "./api.js";
import { Curve } from "./curve.js";
import { $, clock, h, keyed, percent, quantity, seconds, setText } from "./dom.js";

const PATIENCE = 15000; // ms for a prediction; the first one starts a process
const DEBOUNCE = 120; // ms
const FACTORS = { least: -4, most: 4 }; // of the rate: powers of two
const FIGURES = [
  ...["p50", "p90", "p99"].map((p) => [`TTFT ${p}`, (view) => (view.beyond_capacity ? Infinity : view.ttft[p]), seconds, "ttft"]),
  ...["p50", "p90", "p99"].map((p) => [`TPOT ${p}`, (view) => view.tpot[p], seconds, "tpot"]),
  ["Attainment", (view) => view.attainment, percent],
  ["Goodput", (view) => view.goodput, (value) => `${quantity(value)} /s`],
];

const named = ({ prefill, decode }) => {
  if (prefill) return `${prefill} prefill + ${decode} decode`;
  return decode ? `${decode} colocated` : "no workers";
};
const same = (one, other) => one.prefill === other.prefill && one.decode === other.decode;

export class WhatIf {
  // onError(error): for what is not about a prediction, such as a missing key.
  constructor(onError) {
    this.onError = onError;
    this.fields = Object.fromEntries(["prefill", "rate", "ttft", "tpot", "window"].map((name) => [name, $(`choose-${name}`)]));
    this.curve = new Curve("Requests per second within the objective", "requests per second that come");
    $("what-if-curve").append(this.curve.element);
    this.present = null; // pools now: {prefill, decode}
    this.chosen = null; // number of prefill workers; null: as now
    this.answer = null;
    this.asking = false;
    this.timer = 0;
    $("what-if").addEventListener("toggle", () => this.ask());
    $("what-if-form").addEventListener("submit", (event) => event.preventDefault());
    $("what-if-form").addEventListener("input", ({ target }) => {
      if (target === this.fields.prefill) this.chosen = target.valueAsNumber;
      this.label();
      this.ask();
    });
    $("what-if-reset").addEventListener("click", () => this.reset());
    $("apply").addEventListener("click", () => this.confirm());
    $("apply-no").addEventListener("click", () => $("apply-dialog").close());
    $("apply-yes").addEventListener("click", () => this.apply());
  }

  // The page's objective, in seconds: where the sliders begin.
  setObjective({ ttft, tpot }) {
    this.fields.ttft.value = Math.log10(ttft * 1000);
    this.fields.tpot.value = Math.log10(tpot * 1000);
    this.label();
    this.ask();
  }

  // From each poll: the workers' rows and, where a change of roles is or was under way, its state.
  show(workers, { change }) {
    const staying = workers.filter((worker) => worker.state !== "leaving");
    const count = (role) => staying.filter((worker) => (worker.next_role ?? worker.role) === role).length;
    const present = { prefill: count("prefill"), decode: count("decode") };
    const moved = this.present === null || !same(present, this.present);
    this.present = present;
    this.change = change;
    this.showChange();
    if (!moved) return this.label();
    this.fields.prefill.max = Math.max(0, present.prefill + present.decode - 1);
    if (this.chosen === present.prefill) this.chosen = null;
    this.fields.prefill.value = this.chosen ?? present.prefill;
    this.label();
    this.ask();
  }

  reset() {
    this.chosen = null;
    this.fields.rate.value = 0;
    this.fields.prefill.value = this.present.prefill;
    this.label();
    this.ask();
  }

  asked() {
    const prefill = this.chosen ?? this.present.prefill;
    return { prefill, decode: this.present.prefill + this.present.decode - prefill };
  }

  objective() {
    const at = (field) => Number((10 ** (field.valueAsNumber - 3)).toPrecision(2));
    return { ttft: at(this.fields.ttft), tpot: at(this.fields.tpot) };
  }

  label() {
    if (this.present === null) return;
    const factor = 2 ** this.fields.rate.valueAsNumber;
    const { ttft, tpot } = this.objective();
    const rate = this.answer && `${quantity(factor * this.answer.measured_rate)} /s`;
    const told = {
      prefill: named(this.asked()),
      rate: factor === 1 ? `${rate ?? ""} as measured` : `${rate ?? ""} ${quantity(factor)} × measured`,
      ttft: seconds(ttft),
      tpot: seconds(tpot),
    };
    for (const [name, text] of Object.entries(told)) {
      setText($(`what-if-${name}`), text.trim());
      this.fields[name].setAttribute("aria-valuetext", text.trim());
    }
    const changing = this.change?.state === "running";
    $("apply").disabled = changing || same(this.asked(), this.present);
  }

  // Soon; a slider that moves is asked about when the answer before is there.
  ask() {
    if (!$("what-if").open || this.present === null) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.fetch(), DEBOUNCE);
  }

  async fetch() {
    if (this.asking) {
      this.again = true;
      return;
    }
    this.asking = true;
    this.again = false;
    $("what-if").classList.add("asking");
    const factor = 2 ** this.fields.rate.valueAsNumber;
    try {
      if (this.asked().decode === 0) throw new Error("No decode worker is registered: there is nothing to predict from.");
      const question = {
        ...this.asked(), ...this.objective(), rate_factor: factor, seconds: Number(this.fields.window.value),
      };
      this.answer = await call("what-if", { method: "POST", body: question, patience: PATIENCE });
      this.draw(question);
    } catch (error) {
      this.answer = null;
      setText($("what-if-problem"), error.message);
      this.onError(error);
    }
    $("what-if-problem").hidden = this.answer !== null;
    $("what-if-answer").hidden = this.answer === null;
    $("what-if").classList.remove("asking");
    this.label();
    this.asking = false;
    if (this.again) this.fetch();
  }

  draw(question) {
    const { answer } = this;
    const views = [answer.measured, answer.present, answer.asked];
    setText($("what-if-asked"), `Predicted: ${named(question)}`);
    keyed($("what-if-figures").tBodies[0], FIGURES, ([name]) => name,
      ([name]) => h("tr", {}, h("th", { scope: "row" }, name), h("td"), h("td"), h("td")),
      (row, [, value, format, limit]) => views.forEach((view, i) => {
        const cell = row.cells[i + 1];
        setText(cell, format(value(view)));
        cell.classList.toggle("late", limit !== undefined && value(view) > question[limit]);
      }));
    const alike = same(question, { prefill: answer.present_pools[0], decode: answer.present_pools[1] });
    this.curve.show(answer.curve, answer.rate, alike
      ? [{ name: "as now", kind: "strong", value: (point) => point.asked }]
      : [
        { name: "as now", kind: "soft", value: (point) => point.present },
        { name: named(question), kind: "strong", value: (point) => point.asked },
      ]);
    const { beyond_capacity: beyond, attainment } = answer.asked;
    const at = `At ${quantity(answer.rate)} requests/s`;
    setText($("what-if-verdict"), beyond
      ? `${at} the queue of ${named(question)} would grow without end: they compute ${quantity(answer.capacity)} at most.`
      : `${at}, ${named(question)} would keep ${percent(attainment)} within the objective.`);
    $("what-if-unfit").hidden = answer.fits;
    setText($("what-if-basis"), `At ${clock(Date.now() / 1000)}, from the last ${answer.num_observed} requests and the workers' own step times${
      beyond ? "" : `; ±${percent(answer.margin)} by chance`}.`);
  }

  confirm() {
    setText($("apply-title"), `Change the pools to ${named(this.asked())}?`);
    setText($("apply-present"), `Now: ${named(this.present)}.`);
    $("apply-error").hidden = true;
    $("apply-dialog").showModal();
  }

  async apply() {
    try {
      this.change = (await call("pools", { method: "POST", body: this.asked() })).change;
      this.showChange();
      this.label();
      $("apply-dialog").close();
    } catch (error) {
      setText($("apply-error"), error.message);
      $("apply-error").hidden = false;
      this.onError(error);
    }
  }

  showChange() {
    const { change } = this;
    $("change").hidden = !change;
    if (!change) return;
    const told = { running: "Changing", done: "Changed", failed: "Failed to change" }[change.state];
    setText($("change-title"), `${told} to ${named(change)}${change.reason ? `: ${change.reason}` : ""}`);
    $("change-title").className = change.state === "failed" ? "late" : "";
    keyed($("change-flips"), change.flips, ({ worker, role }) => `${worker} ${role}`,
      ({ worker, role }) => h("li", {}, `${worker} → ${role}: `, h("span")),
      (item, flip) => {
        const took = flip.seconds == null ? "" : ` ${seconds(flip.seconds)}`;
        setText(item.lastChild, `${flip.state}${took}`);
        item.className = flip.state;
      });
  }
}
