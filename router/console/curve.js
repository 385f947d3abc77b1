// A curve over the rate of requests, in SVG.

import { step } from "./charts.js";
import { h, quantity, s } from "./dom.js";

const HEIGHT = 220;
const MARGIN = { top: 8, right: 12, bottom: 34, left: 46 };

export class Curve {
  constructor(title, axis) {
    this.title = title;
    this.axis = axis;
    this.keys = h("span", { class: "keys" });
    this.svg = s("svg", { role: "img", height: HEIGHT });
    this.element = h("figure", {}, h("figcaption", {}, h("b", {}, title), this.keys), this.svg);
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  // points: [{rate, …}]; marked: the rate asked about; lines: [{name, kind, value(point)}].
  show(points, marked, lines) {
    Object.assign(this, { points, marked, lines });
    this.keys.replaceChildren(...lines.map(({ name, kind }) => h("span", { class: `key ${kind}` }, name)));
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth;
    if (width === 0 || !this.points) return;
    const right = width - MARGIN.right;
    const bottom = HEIGHT - MARGIN.bottom;
    const end = this.points.at(-1).rate;
    const top = 1.08 * Math.max(...this.points.flatMap((point) => this.lines.map((line) => line.value(point)))) || 1;
    const x = (rate) => MARGIN.left + (right - MARGIN.left) * (rate / end);
    const y = (value) => bottom - (bottom - MARGIN.top) * (value / top);
    const parts = [];
    for (let tick = 0; tick <= top; tick += step(top / 2)) {
      parts.push(
        s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
        s("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, quantity(tick)),
      );
    }
    for (let tick = 0; tick <= end; tick += step(end / 2)) {
      parts.push(s("text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, quantity(tick)));
    }
    parts.push(
      s("text", { x: (MARGIN.left + right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, this.axis),
      s("line", { class: "cursor", x1: x(this.marked), x2: x(this.marked), y1: MARGIN.top, y2: bottom }),
    );
    for (const { kind, value } of this.lines) {
      const at = [{ rate: 0 }, ...this.points].map((p) => `${x(p.rate).toFixed(1)},${y(value(p) ?? 0).toFixed(1)}`);
      parts.push(s("polyline", { class: `line ${kind}`, points: at.join(" ") }));
    }
    const best = this.lines.map(({ name, value }) => `${name} at most ${quantity(Math.max(...this.points.map(value)))}`);
    this.svg.setAttribute("aria-label", `${this.title}: ${best.join(", ")}`);
    this.svg.replaceChildren(...parts);
  }
}
