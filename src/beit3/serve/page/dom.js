/* Making elements. All text is set as text, never as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns an element.
 * @param {string} tag
 * @param {Object} attributes Attributes by name. False and null leave one out, true sets it empty;
 *     "on..." adds a listener; "text" is the content.
 * @param {...(Node|string)} children
 */
export function create(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Returns an SVG element, as `create` does. */
export function createSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

let count = 0;

/** Returns an id that no other element of the page has. */
export function makeId(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

/** Returns a probability, 0 to 1, as percent. */
export function formatPercent(value) {
  const percent = 100 * value;
  return percent >= 10 || percent === 0 ? `${Math.round(percent)}%` : `${percent.toFixed(1)}%`;
}

/** Returns "1 object", "2 objects". */
export function formatCount(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}
