// The list of requests: recent, slow or under way.

import { $, clock, h, keyed, quantity, seconds, setText } from "./dom.js";

const LISTS = { recent: "Recent", slow: "Slow, last 10 min", running: "Under way" };
const NONE = {
  recent: "No request has ended yet.", slow: "No request in the last 10 minutes.", running: "Nothing is under way.",
};
const GOOD = ["stop", "length", "tool_calls"];

export class Requests {
  // open(id, sequence): show a request. objective(): {ttft, tpot} in seconds.
  constructor(open, objective) {
    this.open = open;
    this.objective = objective;
    this.list = "recent";
    this.lists = { recent: [], slow: [], running: [] };
    this.buttons = Object.entries(LISTS).map(([list, name]) =>
      h("button", { "aria-pressed": String(list === this.list), onclick: () => this.choose(list) }, name));
    $("lists").append(...this.buttons);
    $("requests").addEventListener("keydown", moveFocus);
  }

  choose(list) {
    this.list = list;
    Object.keys(LISTS).forEach((name, i) => this.buttons[i].setAttribute("aria-pressed", String(name === list)));
    this.draw();
  }

  show(lists) {
    this.lists = lists;
    this.draw();
  }

  draw() {
    const rows = this.lists[this.list];
    $("no-requests").hidden = rows.length > 0;
    setText($("no-requests"), NONE[this.list]);
    keyed($("requests").tBodies[0], rows, (row) => row.sequence,
      (row) => this.row(row), (element, row) => this.update(element, row));
  }

  row({ id, sequence, received }) {
    const open = () => this.open(id, sequence);
    const button = h("button", { class: "link", title: sequence }, short(sequence));
    const cells = ["", "number wide", "number wide", "number", "number wide", "number", "number wide"]
      .map((kind) => h("td", { class: kind }));
    // A click on the button arrives at the row as well.
    return h("tr", { onclick: open }, h("td", { class: "quiet wide" }, clock(received)), h("td", {}, button), cells);
  }

  update(element, row) {
    const { ttft, tpot } = this.objective();
    const [, , outcome, prompt, output, first, each, wait, total] = element.cells;
    const state = row.outcome ?? row.stage.replaceAll("_", " ");
    setText(outcome, row.attempts.length > 1 ? `${state}, ${row.attempts.length} attempts` : state);
    outcome.className = row.outcome === null || GOOD.includes(row.outcome) ? "" : "late";
    setText(prompt, row.cached_tokens ? `${row.prompt_tokens} (${row.cached_tokens} cached)` : `${row.prompt_tokens}`);
    setText(output, quantity(row.output_tokens));
    setText(first, seconds(row.time_to_first_token));
    first.classList.toggle("late", row.time_to_first_token > ttft);
    setText(each, seconds(row.time_per_output_token));
    each.classList.toggle("late", row.time_per_output_token > tpot);
    setText(wait, seconds(row.longest_wait));
    setText(total, seconds(row.seconds));
  }
}

// "cmpl-0123456789abcdef-0" as "cmpl-01234567", and "…-1" for the second sequence.
function short(sequence) {
  const [, head, index] = sequence.match(/^([^-]*-.{0,8}).*?-(\d+)$/) ?? [null, sequence, "0"];
  return index === "0" ? head : `${head}-${index}`;
}

function moveFocus(event) {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  const button = step && document.activeElement.closest("tr")?.[step]?.querySelector("button");
  if (button) {
    event.preventDefault();
    button.focus();
  }
}
