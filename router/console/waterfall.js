// Where one request's time went.

import { $, clock, h, percent, s, seconds, setText } from "./dom.js";

const ABOUT = {
  receive: "The request came in and was validated, from its first byte on. A long prompt on a slow line, or a busy router process.",
  tokenise: "The router applied the chat template and tokenised the prompt.",
  first_sequence: "Waited until the first sequence from the same prompt had its KV in the caches.",
  router_queue: "Waited in the router: no pair of workers had room.",
  to_prefill: "The request's way to the prefill worker and the first token's way back.",
  prefill_queue: "Waited on the prefill worker for other prompts. Too few prefill workers.",
  grant: "Waited until decode had reserved memory. The decode pool is full.",
  prefill: "The prefill worker, or decode itself, computed the prompt. Long prompts, or a small share of each step.",
  deliver: "In the router, between a token's arrival and the writing of its event to the client. Much of it means that the router process is busy, or that the client reads slowly.",
  transfer: "The last blocks of KV moved and were verified. A slow or shared wire, or a slow peer.",
  first_step: "Decode's own first step: waited for the running one, then computed.",
  decode: "On the decode worker, up to the last token.",
};
const TOKENS_HEIGHT = 60;

export function showRequest(sequences, wanted, objective) {
  const sequence = sequences.find((one) => one.sequence === wanted) ?? sequences[0];
  setText($("request-title"), sequence.sequence);
  const { stages, time_to_first_token: ttft } = sequence;
  const first = ttft ?? sequence.seconds;
  // The first delivery is the first token's.
  const numBefore = ttft === null ? stages.length : 1 + stages.findIndex(({ name }) => name === "deliver");
  const before = stages.slice(0, numBefore), after = stages.slice(numBefore);
  const parts = [
    ...facts(sequence), ...toFirstToken(sequence, before, first, objective),
    ...output(sequence, after, first, objective),
  ];
  $("request-body").replaceChildren(...parts.filter((part) => part != null));
}

function facts(sequence) {
  const { attempts } = sequence;
  const cached = sequence.cached_tokens ? ` (${sequence.cached_tokens} cached)` : "";
  const route = attempts.map(({ prefill, decode }) => (prefill ? `${prefill} → ${decode}` : decode)).join(", then ");
  const pairs = [
    ["Arrived", clock(sequence.received)],
    ["Outcome", sequence.outcome ?? `under way: ${label(sequence.stage)}`],
    ["Prompt", `${sequence.prompt_tokens} tokens${cached}`],
    ["Output", `${sequence.output_tokens} tokens`],
    ["Workers", route || "none"],
  ];
  return [h("dl", { class: "facts" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))))];
}

function toFirstToken(sequence, stages, first, { ttft }) {
  const came = sequence.time_to_first_token !== null;
  const late = first > ttft;
  const without = sequence.outcome === null ? "No token yet" : "No token came";
  const title = came ? "To the first token" : without;
  return [
    h("h3", {}, `${title} `, h("span", { class: late ? "late" : "quiet" },
      `${seconds(first)}, objective ${seconds(ttft)}`)),
    ...explained(stages, 0, first, sequence),
  ];
}

function output(sequence, stages, first, { tpot }) {
  const { time_per_output_token: each } = sequence;
  if (sequence.time_to_first_token === null) return [];
  return [
    h("h3", {}, "From the first token to the end ", h("span", { class: each > tpot ? "late" : "quiet" },
      `${seconds(sequence.seconds - first)}, ${seconds(each)} per token, objective ${seconds(tpot)}`)),
    ...explained(stages, first, sequence.seconds, sequence), tokens(sequence, first),
  ];
}

// The stages between two times, and which of them it was.
function explained(stages, begin, end, { waited_for: waited }) {
  const longest = stages.reduce((a, b) => (b.seconds > a.seconds ? b : a), { seconds: 0 });
  const share = percent(longest.seconds / Math.max(end - begin, 1e-9));
  const verdict = longest.name && h("p", { class: "verdict" },
    h("b", {}, `${share} of it was ${label(longest.name)}. `), ABOUT[longest.name] ?? "",
    longest.name === "router_queue" ? shortages(waited) : "");
  return [verdict, bars(stages, begin, end, longest)];
}

// Which pools had no room, the one that was short for longest first.
function shortages(waited) {
  return Object.entries(waited).sort(([, a], [, b]) => b - a)
    .map(([pool, time]) => ` No ${pool} worker had any for ${seconds(time)}.`).join("");
}

// A row per stage between two times, its bar where it lies.
function bars(stages, begin, end, longest) {
  const whole = Math.max(end - begin, 1e-9);
  const rows = stages.map((stage) => {
    const x = (100 * (stage.start - begin)) / whole;
    const width = Math.max((100 * stage.seconds) / whole, 0.25);
    const picture = s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      s("rect", { class: `stage stage-${stage.name}`, x: Math.min(x, 99.75), width, y: 0, height: 10 }));
    return h("tr", { class: stage === longest ? "longest" : "" },
      h("th", { scope: "row", title: ABOUT[stage.name] }, label(stage.name)),
      h("td", { class: "picture" }, picture), h("td", { class: "number" }, seconds(stage.seconds)),
      h("td", { class: "number quiet wide" }, percent(stage.seconds / whole)));
  });
  return h("table", { class: "waterfall" }, h("tbody", {}, rows));
}

// A tick per token: gaps show where the stream stood still.
function tokens({ token_times: { stride, seconds: times }, seconds: end, longest_gap }, first) {
  if (times.length < 2) return null;
  const whole = Math.max(end - first, 1e-9);
  const ticks = times.map((at) => {
    const x = ((100 * (at - first)) / whole).toFixed(3);
    return `M${x} 0V10`;
  });
  const every = stride === 1 ? "every token" : `every ${stride}th token`;
  return h("figure", { class: "tokens" },
    h("figcaption", { class: "quiet" }, `A line for ${every}; the longest gap is ${seconds(longest_gap)}`),
    s("svg", { viewBox: "0 0 100 10", height: TOKENS_HEIGHT / 2, preserveAspectRatio: "none", role: "img", "aria-label": "When tokens came" },
      s("path", { class: "ticks", d: ticks.join(""), "vector-effect": "non-scaling-stroke" })));
}

const label = (name) => name.replaceAll("_", " ");
