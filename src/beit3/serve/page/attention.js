/* Words of a question or caption; pointing at one shows where on the picture it looks. */

import { create } from "./dom.js";

const SPECIAL = new Set(["<s>", "</s>", "<pad>", "<mask>", "<unk>"]);
const SHADE = [14, 14, 18];
const MAX_SHADE = 0.72; // opacity where a word looks least
const PATCH_PIXELS = 12; // of the drawing; browsers enlarge a pixel per patch in visible steps
const ROWS = ["at the top", "in the middle", "at the bottom"];
const COLUMNS = ["left", "center", "right"];

export class AttentionView {
  /**
   * @param {{words: string[], maps: number[][][]}} attention A map [h][w] for every token.
   * @param {Panel} panel Draws the maps over the picture.
   */
  constructor({ words, maps }, panel) {
    this.panel = panel;
    this.pinned = null;
    this.caption = create("p", {
      class: "hint",
      role: "status",
      text: "Point at a word, or press it to keep its map.",
    });
    this.buttons = joinTokens(words, maps).map((word) => this.#makeButton(word));
    const list = create("div", { class: "words", role: "group" }, ...this.buttons);
    list.setAttribute("aria-label", "Where each word looks");
    list.addEventListener("mouseleave", () => this.#showPinned());
    list.addEventListener("focusout", (event) => {
      if (!list.contains(event.relatedTarget)) this.#showPinned();
    });
    const heading = create("p", { class: "label", text: "Where each word looks" });
    this.element = create("div", { class: "attention" }, heading, list, this.caption);
  }

  #makeButton(word) {
    const show = () => this.#show(word);
    const button = create("button", {
      type: "button",
      text: word.text,
      "aria-pressed": "false",
      onmouseenter: show,
      onfocus: show,
    });
    button.addEventListener("click", () => {
      const isPinned = this.pinned === word;
      this.pinned = isPinned ? null : word;
      for (const other of this.buttons) {
        other.setAttribute("aria-pressed", String(other === button && !isPinned));
      }
      if (isPinned) this.panel.draw();
      else {
        this.#show(word);
        this.panel.picture.reveal();
      }
    });
    return button;
  }

  #show(word) {
    this.panel.draw(drawMap(word.map));
    this.caption.textContent = `“${word.text}” looks mostly ${describePlace(word.map)}.`;
  }

  #showPinned() {
    if (this.pinned) this.#show(this.pinned);
    else this.panel.draw();
  }
}

/**
 * Joins the tokens of each word, and averages their maps. A token that begins with a space (or "▁")
 * begins a word; where none does, every token is a word.
 */
export function joinTokens(tokens, maps) {
  const begins = (token) => /^[ ▁]/.test(token);
  const hasMarks = tokens.some(begins);
  const words = [];
  tokens.forEach((token, index) => {
    if (SPECIAL.has(token.trim()) || !maps[index]) return;
    const text = token.replace(/^[ ▁]+/, "");
    if (!hasMarks || begins(token) || !words.length) words.push({ text, maps: [maps[index]] });
    else {
      const last = words[words.length - 1];
      last.text += text;
      last.maps.push(maps[index]);
    }
  });
  return words
    .filter((word) => word.text)
    .map(({ text, maps: parts }) => ({ text, map: average(parts) }));
}

function average(maps) {
  return maps[0].map((row, y) =>
    row.map((_, x) => maps.reduce((sum, map) => sum + map[y][x], 0) / maps.length),
  );
}

/** Returns a canvas over the picture: dark where a word looks least, clear where most. */
function drawMap(map) {
  const height = map.length * PATCH_PIXELS;
  const width = map[0].length * PATCH_PIXELS;
  const values = map.flat();
  const least = Math.min(...values);
  const range = Math.max(...values) - least || 1;
  const canvas = create("canvas", { class: "layer", width, height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const value = interpolate(map, (y + 0.5) / PATCH_PIXELS, (x + 0.5) / PATCH_PIXELS);
      const shade = MAX_SHADE * (1 - (value - least) / range);
      pixels.data.set([...SHADE, Math.round(255 * shade)], 4 * (y * width + x));
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Returns the value between the centers of the patches around a point, in patches. */
function interpolate(map, y, x) {
  const [top, bottom, down] = findNeighbors(y, map.length);
  const [left, right, along] = findNeighbors(x, map[0].length);
  const above = map[top][left] * (1 - along) + map[top][right] * along;
  const below = map[bottom][left] * (1 - along) + map[bottom][right] * along;
  return above * (1 - down) + below * down;
}

/** Returns the two patches that a position lies between, and how near it is to the second. */
function findNeighbors(position, count) {
  const center = Math.min(Math.max(position - 0.5, 0), count - 1);
  const first = Math.floor(center);
  return [first, Math.min(first + 1, count - 1), center - first];
}

/** Returns in words where a map is largest: "at the top left". */
function describePlace(map) {
  const values = map.flat();
  const index = values.indexOf(Math.max(...values));
  const row = (Math.floor(index / map[0].length) + 0.5) / map.length;
  const column = ((index % map[0].length) + 0.5) / map[0].length;
  const place = `${ROWS[Math.floor(3 * row)]} ${COLUMNS[Math.floor(3 * column)]}`;
  return place === "in the middle center" ? "in the center" : place;
}
