/* Search of the index by words, by the picture, or by one of the results. */

import { makeRelative, toDataUri } from "./api.js";
import { create, formatCount, makeId } from "./dom.js";
import { Panel } from "./panel.js";

const PAGE_SIZE = 12;
const MAX_SHARP_WIDTH = 96;
const HIDDEN_COLUMNS = new Set(["id", "image_path", "caption", "hash", "width", "height"]);

export class SearchPanel extends Panel {
  /** @param {{rows?: number, columns?: Object}} index What is searched. */
  constructor(context, index) {
    const amount = index.rows ? `the ${formatCount(index.rows, "picture")}` : "the pictures";
    super(context, {
      models: [],
      lead: `Searches ${amount} of this server's index by words, or by the picture you chose.`,
      action: "Search",
    });
    this.text = this.addTextField("text", "What to look for", { type: "search" });
    this.similar = create("button", {
      type: "button",
      text: "Find similar",
      onclick: () => this.#searchByPicture(),
    });
    this.submit.after(this.similar);
    this.#addFilter(index.columns ?? {});
    this.urls = [];
  }

  changePicture() {
    // The results stay: the picture may be one of them.
  }

  async start() {
    const text = this.needText(this.text, "Type what to look for first.");
    if (text) await this.#search({ text }, `Results for “${text}”`);
  }

  async #searchByPicture() {
    const blob = this.needPicture();
    if (!blob) return;
    const name = this.picture.name;
    await this.#search({ image: await toDataUri(blob) }, `Pictures similar to “${name}”`);
  }

  async #search(query, title) {
    this.query = { ...query, k: PAGE_SIZE };
    const where = this.where.value.trim();
    if (where) this.query.where = where;
    if (this.group?.value) this.query.group_by = this.group.value;
    this.result.replaceChildren();
    this.urls.forEach((url) => URL.revokeObjectURL(url));
    this.urls = [];
    await this.run("Searching …", async (options) => {
      const { results } = await this.api.postJson("search", this.query, options);
      this.cards = create("ol", { class: "cards", "aria-label": "Pictures, best first" });
      const heading = create("h3", { text: title, tabindex: -1 });
      this.more = create("button", {
        type: "button",
        text: "Show more",
        onclick: () => this.#showMore(),
      });
      this.result.replaceChildren(heading, this.cards, this.more);
      // The button of an old result, which had the focus, is gone.
      if (document.activeElement === document.body) heading.focus();
      await this.#append(results);
      const nothing = where ? "Nothing found with this filter." : "Nothing found.";
      const shown = `${formatCount(results.length, "picture")} shown, the nearest first.`;
      this.say(results.length ? shown : nothing);
      this.revealResult();
    });
  }

  async #showMore() {
    await this.run("Searching …", async (options) => {
      const offset = this.cards.children.length;
      const { results } = await this.api.postJson("search", { ...this.query, offset }, options);
      const first = await this.#append(results);
      this.say(
        results.length ? `${formatCount(results.length, "more picture")} shown.` : "That is all.",
      );
      first?.querySelector("button").focus();
    });
  }

  /** Appends results and returns the first of their cards. */
  async #append(results) {
    const cards = results.map((result) => this.#makeCard(result));
    this.cards.append(...cards);
    this.more.hidden = results.length < PAGE_SIZE;
    return cards[0];
  }

  #makeCard(result) {
    const metadata = result.metadata ?? {};
    const name = metadata.caption || metadata.image_path || result.id;
    const rank = result.rank ?? this.cards.children.length + 1;
    const image = create("img", { alt: name, loading: "lazy" });
    image.addEventListener("load", () => {
      image.classList.toggle("sharp", image.naturalWidth <= MAX_SHARP_WIDTH);
    });
    this.#load(image, result.image_url);
    const terms = Object.entries(metadata)
      .filter(([key, value]) => !HIDDEN_COLUMNS.has(key) && value !== null && value !== "")
      .map(([key, value]) =>
        create("div", {}, create("dt", { text: key }), create("dd", { text: value })),
      );
    const use = create("button", {
      type: "button",
      text: "Use",
      "aria-label": `Use picture ${rank}`,
      onclick: () => this.#use(result, name),
    });
    const similar = create("button", {
      type: "button",
      text: "Similar",
      "aria-label": `Find pictures similar to picture ${rank}`,
      onclick: () => this.#search({ id: result.id }, `Pictures similar to “${name}”`),
    });
    const body = create(
      "div",
      {},
      create(
        "p",
        { class: "top" },
        create("span", { text: rank }),
        create("span", { class: "number", title: "score", text: result.score.toFixed(3) }),
      ),
      create("p", { class: "name", text: name }),
      terms.length ? create("dl", {}, ...terms) : "",
      create("div", { class: "buttons" }, result.image_url ? use : "", similar),
    );
    return create("li", {}, image, body);
  }

  async #load(image, url) {
    if (!url) {
      image.alt = "no picture";
    } else if (this.api.token) {
      // An <img> cannot send the token.
      try {
        image.src = URL.createObjectURL(await this.api.loadPicture(url));
        this.urls.push(image.src);
      } catch {
        image.alt = `${image.alt} (the picture cannot be read)`;
      }
    } else {
      image.src = makeRelative(url);
    }
  }

  async #use(result, name) {
    await this.run("Fetching the picture …", async (options) => {
      const blob = await this.api.loadPicture(result.image_url, options);
      const isShown = await this.picture.set(blob, { name, alt: name });
      this.say(isShown ? "This is the picture now." : "");
      if (isShown) this.picture.reveal();
    });
  }

  #addFilter(columns) {
    const names = Object.keys(columns);
    const hint = names.length ? `${describeFilter(columns)} Columns: ${names.join(", ")}.` : "";
    this.where = this.addTextField("where", "Condition", { hint });
    const parts = [this.where.parentElement];
    const groups = names.filter((name) => !HIDDEN_COLUMNS.has(name));
    if (groups.length) {
      const options = [create("option", { value: "", text: "all" })];
      options.push(...groups.map((name) => create("option", { value: name, text: name })));
      this.group = create("select", { id: makeId("group"), name: "group_by" }, ...options);
      const label = create("label", { for: this.group.id, text: "The best of each" });
      parts.push(create("div", { class: "field" }, label, this.group));
    }
    this.fields.append(create("details", {}, create("summary", { text: "Filter" }), ...parts));
  }
}

/** Returns examples of conditions on the columns of an index, name -> type. */
function describeFilter(columns) {
  const names = Object.keys(columns).filter((name) => !HIDDEN_COLUMNS.has(name));
  const number = names.find((name) => ["int64", "double"].includes(columns[name]));
  let text = names.find((name) => columns[name] === "string");
  if (!text && "caption" in columns) text = "caption";
  const parts = [];
  if (number) parts.push(`${number} >= 3`);
  if (text) parts.push(`${text} contains 'red'`);
  return parts.length ? `For example ${parts.join(" and ")}.` : "";
}
