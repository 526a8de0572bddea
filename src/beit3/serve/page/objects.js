/* Objects: boxes, masks, names and scores drawn on the picture, and the same as a list. */

import { renderFacts } from "./answers.js";
import { create, createSvg, formatCount, formatPercent, makeId } from "./dom.js";
import { decodeRle } from "./masks.js";
import { getColor, getRgb, getTextColor } from "./palette.js";
import { Panel } from "./panel.js";

const FIRST_THRESHOLD = 0.4;
const MAX_MASK_SIDE = 800; // pixels of the drawing, whatever the picture has
const MAX_NAMED = 10; // with more objects the drawing has numbers, and the list their names
const OPACITY = 0.45;
const BRIGHT_OPACITY = 0.7;
const DIM_OPACITY = 0.12;

export class ObjectsPanel extends Panel {
  constructor(context, models) {
    super(context, {
      models,
      lead: "Finds things, and draws a box around each, and its mask where the weights have masks.",
      action: "Find objects",
    });
    this.threshold = FIRST_THRESHOLD;
  }

  async start() {
    const image = this.needPicture();
    if (!image) return;
    this.clear();
    this.draw();
    await this.run("Looking for objects …", async (options) => {
      const answer = await this.api.predict(this.model, { image }, options);
      this.#show(answer);
    });
  }

  #show(answer) {
    const [prediction] = answer.predictions;
    this.width = prediction.width ?? this.picture.width;
    this.height = prediction.height ?? this.picture.height;
    this.objects = prediction.objects.map((item) => this.#prepare(item));
    if (!this.objects.length) {
      this.say("No objects found.");
      this.result.replaceChildren(renderFacts(answer));
      return;
    }
    const best = this.objects[0].score;
    this.threshold = FIRST_THRESHOLD;
    if (best < FIRST_THRESHOLD) this.threshold = Math.floor(100 * best) / 100;
    this.list = create("ol", { class: "objects", "aria-label": "Objects, best first" });
    this.result.replaceChildren(this.#makeSlider(), this.list, renderFacts(answer));
    this.#update();
    this.picture.reveal();
  }

  #prepare(item) {
    const [x1, y1, x2, y2] = item.box;
    const name = item.name ?? `label ${item.label}`;
    return { ...item, name, mask: null, runs: item.mask, box: { x1, y1, x2, y2 } };
  }

  #makeSlider() {
    const id = makeId("threshold");
    const output = create("span", { class: "number", text: formatPercent(this.threshold) });
    const slider = create("input", {
      type: "range",
      id,
      min: 0,
      max: 1,
      step: 0.01,
      value: this.threshold,
      "aria-valuetext": formatPercent(this.threshold),
    });
    slider.addEventListener("input", () => {
      this.threshold = Number(slider.value);
      output.textContent = formatPercent(this.threshold);
      slider.setAttribute("aria-valuetext", output.textContent);
      this.#update();
    });
    const label = create("label", { for: id, text: "Show scores from" });
    return create("div", { class: "slider" }, label, slider, output);
  }

  #update() {
    const visible = this.objects.filter((item) => item.score >= this.threshold);
    for (const item of visible.filter((item) => item.runs)) {
      item.mask ??= cutMask(decodeRle(item.runs)); // many are never shown
    }
    this.say(`${visible.length} of ${formatCount(this.objects.length, "object")} shown.`);
    this.canvas = makeMaskCanvas(visible);
    if (this.picture.isSharp) this.canvas?.classList.add("sharp");
    this.labels = visible.map((item, index) => this.#makeLabel(item, index, visible.length));
    this.boxes = visible.map((item) => makeBox(item));
    const box = `0 0 ${this.width} ${this.height}`;
    const svg = createSvg("svg", { class: "layer", viewBox: box, preserveAspectRatio: "none" });
    svg.append(...this.boxes);
    svg.setAttribute("aria-hidden", "true");
    const labels = create("div", { class: "layer labels", "aria-hidden": "true" }, ...this.labels);
    const rows = visible.map((item, index) => this.#makeRow(item, index, visible));
    this.list.replaceChildren(...rows);
    this.draw(...[this.canvas, svg, labels].filter(Boolean));
    this.#highlight(visible, null);
  }

  #makeLabel(item, index, count) {
    const text = count > MAX_NAMED ? index + 1 : `${item.name} ${formatPercent(item.score)}`;
    const label = create("span", { text });
    const { x1, y1, x2 } = item.box;
    label.style.zIndex = count - index; // the best is never covered
    label.style.background = getColor(item.label);
    label.style.color = getTextColor(item.label);
    label.style.top = `${(100 * y1) / this.height}%`;
    // Far on the right the label ends where the box does, so that it stays on the picture.
    if (x1 > 0.6 * this.width) label.style.right = `${100 - (100 * x2) / this.width}%`;
    else label.style.left = `${(100 * x1) / this.width}%`;
    if (y1 > 0.1 * this.height) label.classList.add("above");
    return label;
  }

  #makeRow(item, index, visible) {
    const highlight = () => this.#highlight(visible, index);
    const swatch = create("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = getColor(item.label);
    const button = create(
      "button",
      {
        type: "button",
        onmouseenter: highlight,
        onfocus: highlight,
        onmouseleave: () => this.#highlight(visible, null),
        onblur: () => this.#highlight(visible, null),
        onclick: () => this.picture.reveal(),
      },
      create("span", { class: "count", text: index + 1 }),
      swatch,
      create("span", { class: "name", text: item.name }),
      create("span", { class: "number", text: formatPercent(item.score) }),
    );
    return create("li", {}, button);
  }

  #highlight(visible, chosen) {
    visible.forEach((_, index) => {
      const isDim = chosen !== null && index !== chosen;
      for (const element of [this.boxes[index], this.labels[index]]) {
        element.classList.toggle("dim", isDim);
      }
    });
    if (this.canvas) paintMasks(this.canvas, visible, chosen);
  }
}

function makeBox({ box: { x1, y1, x2, y2 }, label }) {
  const frame = { x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0) };
  // A dark line under the colored one: it stands out on pictures of any brightness.
  return createSvg(
    "g",
    {},
    createSvg("rect", { class: "edge", ...frame }),
    createSvg("rect", { class: "box", stroke: getColor(label), ...frame }),
  );
}

// Masks -------------------------------------------------------------------------------------------

/** Returns the part of a mask, at the size of the drawing, that holds all of its pixels. */
function cutMask({ width, height, pixels }) {
  const scale = Math.min(1, MAX_MASK_SIDE / Math.max(width, height));
  const columns = Math.max(1, Math.round(width * scale));
  const rows = Math.max(1, Math.round(height * scale));
  const points = [];
  for (let y = 0; y < rows; y += 1) {
    const row = Math.floor(((y + 0.5) * height) / rows) * width;
    for (let x = 0; x < columns; x += 1) {
      if (pixels[row + Math.floor(((x + 0.5) * width) / columns)]) points.push(y * columns + x);
    }
  }
  return { columns, rows, points: Uint32Array.from(points) };
}

function makeMaskCanvas(objects) {
  const mask = objects.find((item) => item.mask)?.mask;
  if (!mask) return null;
  const { columns: width, rows: height } = mask;
  return create("canvas", { class: "layer", width, height, "aria-hidden": "true" });
}

/** Paints all masks, the best on top; with a chosen one the others are faint. */
function paintMasks(canvas, objects, chosen) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let index = objects.length - 1; index >= 0; index -= 1) {
    const { mask, label } = objects[index];
    if (!mask) continue;
    const rgb = getRgb(label);
    let opacity = OPACITY;
    if (chosen !== null) opacity = index === chosen ? BRIGHT_OPACITY : DIM_OPACITY;
    const color = [...rgb, Math.round(255 * opacity)];
    for (const point of mask.points) {
      for (let channel = 0; channel < 4; channel += 1) {
        image.data[4 * point + channel] = color[channel];
      }
    }
  }
  context.putImageData(image, 0, 0);
}
