/* What every tool has: form, choice of weights, busy state with Cancel, result, error. */

import { ServerError } from "./api.js";
import { create, makeId } from "./dom.js";

const MIN_VISIBLE = 120; // pixels: a question and its answer

export class Panel {
  /**
   * @param {Object} context `api` and `picture`, the same for all panels.
   * @param {Object} options
   * @param {string} options.lead A sentence on what the tool does.
   * @param {string} options.action What the button says.
   * @param {Array} options.models Weights that can do it; several get a chooser.
   */
  constructor(context, { lead, action, models }) {
    Object.assign(this, context);
    this.models = models;
    this.controller = null;
    /** Elements that are drawn over the picture while this tool is open. */
    this.layers = [];
    this.fields = create("div", { class: "inputs" });
    this.submit = create("button", { class: "primary", text: action });
    this.cancel = create("button", {
      type: "button",
      text: "Cancel",
      hidden: true,
      onclick: () => this.stop("Canceled."),
    });
    this.buttons = create("div", { class: "buttons" }, this.submit, this.cancel);
    this.form = create("form", { class: "fields", novalidate: true }, this.fields);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.controller) this.start();
    });
    if (models.length > 1) this.form.append(this.#makeChooser());
    this.form.append(this.buttons);
    this.progress = create("div", { class: "progress", hidden: true });
    this.status = create("p", { class: "status", role: "status" });
    this.error = create("p", { class: "error", role: "alert", id: makeId("error") });
    this.result = create("div", { class: "result" });
    this.element = create(
      "div",
      {},
      create("p", { class: "lead", text: lead }),
      this.form,
      this.progress,
      this.status,
      this.error,
      this.result,
    );
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop("Canceled.");
    });
  }

  /** The chosen weights. */
  get model() {
    return this.models[this.chooser?.selectedIndex ?? 0];
  }

  /** Does the work of the tool; tools override it. */
  async start() {}

  /** Is told that the picture is another one: what is shown was about the old one. */
  changePicture() {
    this.stop("");
    this.clear();
  }

  /** Empties the result, the error and the drawing. */
  clear() {
    this.layers = [];
    this.result.replaceChildren();
    this.say("");
  }

  /** Adds a labeled text field and returns its input. */
  addTextField(name, label, { hint = "", ...attributes } = {}) {
    const input = create(attributes.rows ? "textarea" : "input", {
      id: makeId(name),
      name,
      autocomplete: "off",
      ...attributes,
    });
    this.#addField(input, label, hint);
    return input;
  }

  /** Adds a labeled chooser of a picture file and returns its input. */
  addFileField(name, label) {
    const input = create("input", { id: makeId(name), name, type: "file", accept: "image/*" });
    this.#addField(input, label, "");
    return input;
  }

  /** Returns the picture, or says that one is needed and returns null. */
  needPicture() {
    if (!this.picture.blob) this.complain("Choose a picture first.");
    return this.picture.blob;
  }

  /** Returns a field's text, or says that it is needed and returns null. */
  needText(input, message) {
    const text = input.value.trim();
    if (text) return text;
    this.complain(message);
    this.#markInvalid(input);
    input.focus();
    return null;
  }

  /**
   * Runs requests with the busy state around them; errors are shown in words.
   * @param {string} message What is being done, for the time it takes.
   * @param {(options: Object) => Promise<void>} work Gets `signal` and `onWait` for `Api`.
   */
  async run(message, work) {
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    const onWait = (seconds) => {
      const wait = seconds < 1 ? "a moment" : `${Math.ceil(seconds)} s`;
      this.say(`The server is busy: trying again in ${wait} …`);
    };
    this.#setBusy(true);
    this.say(message);
    try {
      await work({ signal: controller.signal, onWait });
    } catch (error) {
      if (error.name !== "AbortError" && this.controller === controller) this.#report(error);
    } finally {
      if (this.controller === controller) {
        this.controller = null;
        this.#setBusy(false);
      }
    }
  }

  /** Ends what is running, if anything is. */
  stop(message) {
    if (!this.controller) return;
    this.controller.abort();
    this.controller = null;
    this.#setBusy(false);
    this.say(message);
    if (message) this.submit.focus();
  }

  /**
   * Says what has happened; screen readers read it out. `isShown`: it can be seen beside this line,
   * which is then for screen readers alone.
   */
  say(message, { isShown = false } = {}) {
    this.status.textContent = message;
    this.status.classList.toggle("unseen", isShown);
    this.complain("");
  }

  /** Says what is wrong. */
  complain(message) {
    this.error.textContent = message;
    if (message) this.status.textContent = "";
    for (const input of this.form.querySelectorAll("[aria-invalid]")) {
      input.removeAttribute("aria-invalid");
    }
  }

  /** Brings the result into view where it begins below the window, as on phones. */
  revealResult() {
    const { top } = this.result.getBoundingClientRect();
    if (top > window.innerHeight - MIN_VISIBLE) this.result.scrollIntoView({ block: "nearest" });
  }

  /** Draws over the picture, as long as this tool is open. */
  draw(...layers) {
    this.layers = layers;
    this.picture.draw(...layers);
  }

  #report(error) {
    const isOurs = !(error instanceof ServerError);
    if (isOurs) console.error(error);
    this.complain(isOurs ? `The page cannot show this answer: ${error.message}` : error.message);
    const input = error.field && this.form.elements.namedItem(error.field);
    if (input instanceof HTMLElement) {
      this.#markInvalid(input);
      input.focus();
    }
  }

  #markInvalid(input) {
    const details = input.closest("details");
    if (details) details.open = true;
    input.setAttribute("aria-invalid", "true");
  }

  #setBusy(isBusy) {
    this.progress.hidden = !isBusy;
    this.cancel.hidden = !isBusy;
    this.element.setAttribute("aria-busy", String(isBusy));
    this.submit.setAttribute("aria-disabled", String(isBusy));
  }

  #makeChooser() {
    const options = this.models.map((model) => create("option", { text: model.name }));
    this.chooser = create("select", { id: makeId("model") }, ...options);
    const label = create("label", { for: this.chooser.id, text: "Weights" });
    return create("div", { class: "field" }, label, this.chooser);
  }

  #addField(input, label, hint) {
    const parts = [create("label", { for: input.id, text: label }), input];
    const describers = [this.error?.id].filter(Boolean);
    if (hint) {
      parts.push(create("p", { class: "hint", id: makeId("hint"), text: hint }));
      describers.unshift(parts[2].id);
    }
    if (describers.length) input.setAttribute("aria-describedby", describers.join(" "));
    this.fields.append(create("div", { class: "field" }, ...parts));
  }
}
