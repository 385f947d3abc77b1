// Line charts of the last ten minutes, in SVG.

import { h, s, setText } from "./dom.js";

const SLOTS = 120;
const SLOT_SECONDS = 5;
const HEIGHT = 132;
const MARGIN = { top: 8, right: 8, bottom: 18, left: 52 };

// A round step that divides `top` into at most four.
export function step(top) {
  const power = 10 ** Math.floor(Math.log10(top / 4));
  return power * [1, 2, 5, 10].find((factor) => factor * power * 4 >= top);
}

export class Chart {
  // lines: [{name, kind, value(point)}]; limit(): a value to stay below, or null.
  constructor(title, lines, format, limit = () => null) {
    this.lines = lines;
    this.format = format;
    this.limit = limit;
    this.points = [];
    this.newest = 0; // slot
    this.changes = []; // slots, not whole ones
    this.readout = h("span", { class: "readout" });
    this.svg = s("svg", { role: "img", height: HEIGHT });
    const names = lines.map(({ name, kind }) => h("span", { class: `key ${kind}` }, name));
    this.changed = h("span", { class: "key change", hidden: true }, "pools changed");
    this.element = h(
      "figure", {},
      h("figcaption", {}, h("b", {}, title), ...names, this.changed, this.readout), this.svg,
    );
    this.title = title;
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  // changes: when the pools were changed, in Unix seconds.
  show(points, changes) {
    this.points = points;
    this.newest = points.at(-1)?.slot ?? 0;
    const ago = (time) => Math.max(0, Date.now() / 1000 - time) / SLOT_SECONDS;
    this.changes = changes.map((time) => this.newest - ago(time)).filter((at) => this.newest - at < SLOTS);
    this.changed.hidden = this.changes.length === 0;
    this.draw();
  }

  x(slot) {
    const inner = this.width - MARGIN.left - MARGIN.right;
    return MARGIN.left + inner * (1 - (this.newest - slot) / (SLOTS - 1));
  }

  draw() {
    this.width = this.svg.clientWidth;
    if (this.width === 0) return;
    const limit = this.limit();
    const values = this.points.flatMap((p) => this.lines.map((line) => line.value(p) ?? 0));
    const highest = Math.max(...values, 0);
    // The limit belongs in the picture unless the lines would be flat below it.
    const top = Math.max(highest, limit !== null && limit < 4 * highest ? limit : 0) * 1.08 || 1;
    const bottom = HEIGHT - MARGIN.bottom;
    const y = (value) => bottom - (bottom - MARGIN.top) * (value / top);
    const right = this.width - MARGIN.right;
    const parts = [];
    for (let tick = 0; tick <= (highest > 0 ? top : 0); tick += step(top)) {
      parts.push(
        s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
        s("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick === 0 ? "0" : this.format(tick)),
      );
    }
    for (const minutes of [10, 5, 0]) {
      const at = this.x(this.newest - Math.min((minutes * 60) / SLOT_SECONDS, SLOTS - 1));
      const anchor = minutes === 10 ? "start" : minutes === 0 ? "end" : "middle";
      parts.push(s("text", { x: at, y: HEIGHT - 4, "text-anchor": anchor }, minutes ? `${minutes} min ago` : "now"));
    }
    if (limit !== null && highest > 0 && limit <= top) {
      parts.push(s("line", { class: "limit", x1: MARGIN.left, x2: right, y1: y(limit), y2: y(limit) }));
    }
    for (const at of this.changes) {
      parts.push(s("line", { class: "change", x1: this.x(at), x2: this.x(at), y1: MARGIN.top, y2: bottom }));
    }
    for (const { kind, value } of this.lines) parts.push(...this.drawLine(kind, value, y));
    this.cursor = s("line", { class: "cursor", y1: MARGIN.top, y2: bottom, visibility: "hidden" });
    this.svg.setAttribute("aria-label", this.describe());
    this.svg.replaceChildren(...parts, this.cursor);
    if (this.pointed != null) this.pointAt(this.pointed);
  }

  // A stroke per run of points with values; a lone point is a dot.
  drawLine(kind, value, y) {
    const runs = [[]];
    for (const point of this.points) {
      const at = value(point);
      if (at == null) runs.push([]);
      else runs.at(-1).push(`${this.x(point.slot).toFixed(1)},${y(at).toFixed(1)}`);
    }
    return runs.filter((run) => run.length).map((run) =>
      s("polyline", { class: `line ${kind}`, points: (run.length === 1 ? [run[0], run[0]] : run).join(" ") }));
  }

  describe() {
    const last = this.points.at(-1);
    const now = last ? this.lines.map(({ name, value }) => `${name} ${this.text(value(last))}`) : ["no data"];
    return `${this.title}: ${now.join(", ")}`;
  }

  text(value) {
    return value == null ? "–" : this.format(value);
  }

  point(event) {
    this.pointed = null;
    this.cursor?.setAttribute("visibility", "hidden");
    setText(this.readout, "");
    if (event === null || this.points.length === 0) return;
    this.pointed = event.clientX - this.svg.getBoundingClientRect().left;
    this.pointAt(this.pointed);
  }

  pointAt(x) {
    const distance = (p) => Math.abs(this.x(p.slot) - x);
    const point = this.points.reduce((best, p) => (distance(p) < distance(best) ? p : best));
    const at = this.x(point.slot);
    this.cursor.setAttribute("x1", at);
    this.cursor.setAttribute("x2", at);
    this.cursor.setAttribute("visibility", "visible");
    const ago = (this.newest - point.slot) * SLOT_SECONDS;
    const values = this.lines.map(({ name, value }) => `${name} ${this.text(value(point))}`);
    setText(this.readout, `${values.join(" · ")} · ${ago ? `${ago} s ago` : "now"}`);
  }
}
