/* Segmentation: the label of every pixel drawn over the picture, and a legend. */

import { renderFacts } from "./answers.js";
import { create, formatCount, formatPercent, makeId } from "./dom.js";
import { decodeLabelMap } from "./masks.js";
import { getColor, getRgb } from "./palette.js";
import { Panel } from "./panel.js";

const FIRST_OPACITY = 0.6;
const DIM_OPACITY = 0.08;

export class SegmentsPanel extends Panel {
  constructor(context, models) {
    super(context, {
      models,
      lead: "Names every part of the picture: each pixel gets a label.",
      action: "Label the picture",
    });
    this.opacity = FIRST_OPACITY;
  }

  async start() {
    const image = this.needPicture();
    if (!image) return;
    this.clear();
    this.draw();
    const { model } = this;
    await this.run("Labeling every pixel …", async (options) => {
      const answer = await this.api.predict(model, { image }, options);
      const [prediction] = answer.predictions;
      this.map = await decodeLabelMap(prediction.map);
      this.names = prediction.classes ?? answer.classes ?? model.classes;
      this.#show(answer);
    });
  }

  #show(answer) {
    const { width, height, labels } = this.map;
    const areas = new Map();
    for (const label of labels) areas.set(label, (areas.get(label) ?? 0) + 1);
    const sorted = [...areas].sort((first, second) => second[1] - first[1]);
    this.canvas = create("canvas", { class: "layer", width, height, "aria-hidden": "true" });
    if (this.picture.isSharp) this.canvas.classList.add("sharp");
    const rows = sorted.map(([label, area]) => this.#makeRow(label, area / labels.length));
    const legend = create("ol", { class: "objects", "aria-label": "Labels, largest first" });
    legend.append(...rows);
    this.result.replaceChildren(this.#makeSlider(), legend, renderFacts(answer));
    this.#paint(null);
    this.draw(this.canvas);
    this.say(`${formatCount(sorted.length, "label")}, the largest ${this.#getName(sorted[0][0])}.`);
    this.picture.reveal();
  }

  #getName(label) {
    return this.names?.[label] ?? `label ${label}`;
  }

  #makeRow(label, fraction) {
    const swatch = create("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = getColor(label);
    const button = create(
      "button",
      {
        type: "button",
        onmouseenter: () => this.#paint(label),
        onfocus: () => this.#paint(label),
        onmouseleave: () => this.#paint(null),
        onblur: () => this.#paint(null),
        onclick: () => this.picture.reveal(),
      },
      swatch,
      create("span", { class: "name", text: this.#getName(label) }),
      create("span", { class: "number", text: formatPercent(fraction) }),
    );
    return create("li", {}, button);
  }

  #makeSlider() {
    const id = makeId("opacity");
    const output = create("span", { class: "number", text: formatPercent(this.opacity) });
    const slider = create("input", { type: "range", id, min: 0, max: 1, step: 0.05 });
    slider.value = this.opacity;
    slider.addEventListener("input", () => {
      this.opacity = Number(slider.value);
      output.textContent = formatPercent(this.opacity);
      this.#paint(null);
    });
    const label = create("label", { for: id, text: "Opacity" });
    return create("div", { class: "slider" }, label, slider, output);
  }

  /** Paints all labels, or one bright and the others faint. */
  #paint(chosen) {
    const { width, height, labels } = this.map;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(width, height);
    labels.forEach((label, index) => {
      const isDim = chosen !== null && label !== chosen;
      const opacity = isDim ? DIM_OPACITY : this.opacity;
      image.data.set([...getRgb(label), Math.round(255 * opacity)], 4 * index);
    });
    context.putImageData(image, 0, 0);
  }
}
