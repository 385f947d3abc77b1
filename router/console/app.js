// Polls the router each second and keeps the page true.

import { call, hasKey, NeedsKey, setKey } from "./api.js";
import { Autopilot } from "./autopilot.js";
import { Chart } from "./charts.js";
import { $, clock, h, keyed, percent, quantity, seconds, setText } from "./dom.js";
import { Pools } from "./pools.js";
import { Requests } from "./requests.js";
import { showRequest } from "./waterfall.js";
import { WhatIf } from "./what_if.js";

const INTERVAL = 1000; // ms
const MAX_POINTS = 120;
const OBJECTIVE = "kvferry-objective";

let objective = { ttft: 1, tpot: 0.1, ...JSON.parse(localStorage.getItem(OBJECTIVE) ?? "{}") }; // seconds
let points = []; // of the charts, the newest last
let timer = 0;
let lastAnswer = null; // Unix seconds

const charts = [
  new Chart("Time to first token", [
    { name: "p50", kind: "soft", value: (p) => p.time_to_first_token?.p50 },
    { name: "p99", kind: "strong", value: (p) => p.time_to_first_token?.p99 },
  ], seconds, () => objective.ttft),
  new Chart("Inter-token latency", [
    { name: "p50", kind: "soft", value: (p) => p.inter_token_latency?.p50 },
    { name: "p99", kind: "strong", value: (p) => p.inter_token_latency?.p99 },
  ], seconds, () => objective.tpot),
  new Chart("Requests per second", [
    { name: "arrived", kind: "soft", value: (p) => p.requests },
    { name: "within the objective", kind: "strong", value: (p) => p.goodput },
  ], quantity),
  new Chart("Tokens per second", [
    { name: "prompt", kind: "soft", value: (p) => p.prompt_tokens },
    { name: "output", kind: "strong", value: (p) => p.output_tokens },
  ], quantity),
];
const pools = new Pools();
const autopilot = new Autopilot();
const requests = new Requests(openRequest, () => objective);
const whatIf = new WhatIf((error) => error instanceof NeedsKey && askKey(error));

async function poll() {
  clearTimeout(timer);
  try {
    const asked = objective;
    const after = points.at(-1)?.slot ?? 0;
    const answers = await Promise.all([
      call(`overview?ttft=${asked.ttft}&tpot=${asked.tpot}&after=${after}`),
      ...["requests", "pools", "autopilot"].map((path) => call(path)),
    ]);
    if (asked === objective) show(...answers);
  } catch (error) {
    if (error instanceof NeedsKey) askKey(error);
    else sayProblem(error.message);
  }
  clearTimeout(timer);
  if (!document.hidden && !$("key").open) timer = setTimeout(poll, INTERVAL);
}

function show(overview, lists, change, decisions) {
  lastAnswer = Date.now() / 1000;
  $("problem").hidden = true;
  document.querySelector("main").hidden = false;
  document.body.classList.remove("stale");
  setText($("model"), overview.model);
  setStatus(overview.not_ready_reason === null, overview.not_ready_reason ?? "Serving");
  showPresent(overview.window);
  const fresh = overview.history;
  if (fresh.length && fresh[0].slot <= (points.at(-1)?.slot ?? 0)) points = []; // another router
  points = [...points, ...fresh].slice(-MAX_POINTS);
  autopilot.show(decisions);
  for (const chart of charts) chart.show(points, autopilot.changes());
  pools.show(overview);
  requests.show(lists);
  whatIf.show(overview.workers, change);
}

function showPresent({ goodput, rates, ...latency }) {
  const rows = [
    ["Time to first token", latency.time_to_first_token, objective.ttft],
    ["Time per output token", latency.time_per_output_token, objective.tpot],
    ["Inter-token latency", latency.inter_token_latency, objective.tpot],
  ];
  keyed($("latency").tBodies[0], rows, ([name]) => name,
    ([name]) => h("tr", {}, h("th", { scope: "row" }, name), h("td"), h("td"), h("td")),
    (row, [, found, limit]) => ["p50", "p90", "p99"].forEach((name, i) => {
      const cell = row.cells[i + 1];
      setText(cell, seconds(found?.[name]));
      cell.classList.toggle("late", found?.[name] > limit);
    }));
  const figures = [
    ["Goodput", quantity(goodput.requests_per_second), "requests/s within the objective"],
    ["Attainment", percent(goodput.attainment, goodput.attainment > 0.99 ? 2 : 1), "of those that ended"],
    ["Requests", quantity(rates.requests), `per second, ${quantity(rates.failed)} failed`],
    ["Prompt", quantity(rates.prompt_tokens), "tokens per second"],
    ["Output", quantity(rates.output_tokens), "tokens per second"],
  ];
  keyed($("rates"), figures, ([name]) => name,
    ([name]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("b"), h("span", { class: "quiet" }))),
    (element, [, figure, unit]) => {
      setText(element.lastChild.firstChild, figure);
      setText(element.lastChild.lastChild, unit);
    });
}

function setStatus(good, text) {
  setText($("status"), text);
  $("status").className = good ? "pill good" : "pill bad";
}

function sayProblem(message) {
  const since = lastAnswer === null ? "" : ` What you see is of ${clock(lastAnswer)}.`;
  setText($("problem"), `${message}.${since} Trying again each second.`);
  $("problem").hidden = false;
  document.body.classList.add("stale");
  setStatus(false, "Connection lost");
}

function askKey({ message }) {
  if ($("key").open) return;
  if (hasKey()) {
    setText($("key-problem"), `The router does not accept this key: ${message}. Give another one.`);
    $("key-problem").className = "warning";
  }
  setStatus(false, "Needs a key");
  $("key").showModal();
}

async function openRequest(id, sequence) {
  try {
    const { sequences } = await call(`requests/${encodeURIComponent(id)}`);
    showRequest(sequences, sequence, objective);
  } catch (error) {
    if (error instanceof NeedsKey) return askKey(error);
    setText($("request-title"), sequence);
    $("request-body").replaceChildren(h("p", { class: "warning" }, error.message));
  }
  $("request").showModal();
}

function setObjective() {
  const fields = $("objective").elements;
  const chosen = { ttft: fields.ttft.valueAsNumber / 1000, tpot: fields.tpot.valueAsNumber / 1000 };
  if (!$("objective").reportValidity() || !(chosen.ttft > 0 && chosen.tpot > 0)) return;
  objective = chosen;
  localStorage.setItem(OBJECTIVE, JSON.stringify(objective));
  points = []; // their goodput is of the former objective
  whatIf.setObjective(objective);
  poll();
}

$("charts").append(...charts.map((chart) => chart.element));
for (const name of ["ttft", "tpot"]) $("objective").elements[name].value = objective[name] * 1000;
whatIf.setObjective(objective);
$("objective").addEventListener("change", setObjective);
$("objective").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("cancel", (event) => event.preventDefault());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key-input").value.trim());
  $("key-input").value = "";
  $("key").close();
  poll();
});
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
