// Both pools as rows of workers, and draining one of them.

import { call } from "./api.js";
import { $, h, keyed, quantity, seconds, setText } from "./dom.js";

const ROLES = ["prefill", "decode"];
const FLOW = [
  ["tokenise", "tokenise"], ["first_sequence", "wait for first"], ["router_queue", "router queue"],
  ["prefill", "prefill"], ["decode", "decode"],
];

export class Pools {
  constructor() {
    this.tables = Object.fromEntries(ROLES.map((role) => [role, this.table(role)]));
    $("pools").append(...ROLES.map((role) => this.tables[role].element));
    $("drain-no").addEventListener("click", () => $("drain").close());
    $("drain-yes").addEventListener("click", () => this.drain());
  }

  table(role) {
    const body = h("tbody");
    const count = h("span", { class: "quiet" });
    const empty = h("p", { class: "quiet empty" }, `No ${role} worker is registered.`);
    const heads = [
      ["Worker"], ["State", "wide"], ["Running"], ["Waiting"], ["KV in use"], ["Transport", "wide transport"], [""],
    ].map(([name, kind]) => h("th", { scope: "col", class: kind }, name));
    const element = h(
      "div", { class: `pool ${role}` },
      h("h3", {}, `${role[0].toUpperCase()}${role.slice(1)} `, count),
      h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)), empty,
    );
    return { element, body, count, empty };
  }

  show({ workers, stages, queue }) {
    this.workers = workers;
    for (const role of ROLES) {
      const mine = workers.filter((worker) => worker.role === role).sort(byId);
      const { body, count, empty } = this.tables[role];
      setText(count, mine.length === 1 ? "1 worker" : `${mine.length} workers`);
      empty.hidden = mine.length > 0;
      keyed(body, mine, (worker) => worker.id, (worker) => this.row(worker), updateRow);
    }
    const flow = FLOW.filter(([stage]) => stages[stage] || ["router_queue", "prefill", "decode"].includes(stage));
    keyed($("flow"), flow, ([stage]) => stage,
      ([stage, name]) => h("li", { class: `stage-${stage}` }, h("b"), ` ${name}`),
      (item, [stage]) => setText(item.firstElementChild, quantity(stages[stage] ?? 0)));
    const short = queue.short_of.join(" and ");
    $("short").hidden = short === "";
    setText($("short"), `The router's queue waits for room in ${short}; a new request would wait for about ${seconds(queue.wait)}.`);
  }

  row({ id }) {
    const cells = ["wide", "number", "number", "", "wide transport"].map((kind) => h("td", { class: kind }));
    cells[3].append(h("span", { class: "bar" }, h("span")), h("span", { class: "bar-text" }));
    const button = h("button", { onclick: () => this.ask(id), "aria-label": `Drain ${id}` }, "Drain");
    return h("tr", {}, h("th", { scope: "row" }, id), cells, h("td", { class: "action" }, button));
  }

  ask(id) {
    this.asked = id;
    const { role } = this.workers.find((worker) => worker.id === id) ?? {};
    const serving = this.workers.filter((w) => w.role === role && w.state === "serving");
    setText($("drain-title"), `Drain ${id}?`);
    $("drain-last").hidden = serving.length > 1;
    $("drain-error").hidden = true;
    $("drain").showModal();
  }

  async drain() {
    try {
      await call(`workers/${encodeURIComponent(this.asked)}/drain`, { method: "POST" });
      $("drain").close();
    } catch (error) {
      setText($("drain-error"), error.message);
      $("drain-error").hidden = false;
    }
  }
}

const byId = (one, other) => one.id.localeCompare(other.id, undefined, { numeric: true });

function updateRow(row, worker) {
  const [state, running, waiting, kv, transport, action] = row.querySelectorAll("td");
  const { load = {} } = worker;
  const used = load.total_blocks ? 1 - load.free_blocks / load.total_blocks : 0;
  setText(state, worker.state ?? "");
  row.classList.toggle("leaving", worker.state === "leaving");
  setText(running, `${quantity(load.num_running)}${worker.role === "decode" ? ` / ${load.max_num_seqs}` : ""}`);
  setText(waiting, load.waiting_tokens ? `${load.num_waiting} (${quantity(load.waiting_tokens)} tok)` : quantity(load.num_waiting));
  kv.title = `${(load.total_blocks ?? 0) - (load.free_blocks ?? 0)} of ${load.total_blocks ?? 0} blocks`;
  kv.firstChild.firstChild.style.width = `${100 * used}%`;
  kv.firstChild.classList.toggle("full", used > 0.9);
  setText(kv.lastChild, `${(100 * used).toFixed(0)} %`);
  // "UCX 1.21 (where from): what it connects with": the last part tells workers apart.
  setText(transport, worker.transport?.split("): ").at(-1) ?? "");
  transport.title = worker.transport ?? "";
  action.firstChild.disabled = worker.state === "leaving";
}
