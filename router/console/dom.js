// Elements and numbers. Text is always set as text, never as markup.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const h = (tag, attributes = {}, ...children) =>
  build(document.createElement(tag), attributes, children);

export const s = (tag, attributes = {}, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// One child of `parent` per item, in order. An item's element lives as long as the item, so that
// what has the keyboard's focus keeps it while the page is updated.
export function keyed(parent, items, keyOf, create, update) {
  const known = parent.keyed ?? new Map();
  const present = new Map();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    const element = known.get(key) ?? create(item);
    update(element, item);
    present.set(key, element);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const [key, element] of known) if (!present.has(key)) element.remove();
  parent.keyed = present;
}

export function seconds(value) {
  if (value == null) return "–";
  if (value === Infinity) return "∞";
  if (value >= 100) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  const ms = value * 1000;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 1 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

export function quantity(value) {
  if (value == null) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(1)}k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(value >= 10 ? 1 : 2);
}

export const percent = (share, digits = 1) =>
  share == null ? "–" : `${(100 * share).toFixed(share === 1 ? 0 : digits)} %`;

export const clock = (unixSeconds) =>
  new Date(unixSeconds * 1000).toLocaleTimeString([], { hour12: false });
