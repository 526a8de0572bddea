/* Tools that answer in words: questions, captions, classes, and tasks unknown to this page. */

import { AttentionView } from "./attention.js";
import { create, formatPercent, makeId } from "./dom.js";
import { Panel } from "./panel.js";

const MAX_CANDIDATES = 5;
const LABELS = {
  question: "Question",
  statement: "Statement",
  text: "Text",
  image2: "Second picture",
};

/** A form with a field for every input of the task beside the picture. */
export class AnswerPanel extends Panel {
  /** @param {Object} options As Panel's, and `busy`: what the status says meanwhile. */
  constructor(context, options) {
    super(context, options);
    this.busy = options.busy;
    this.inputs = new Map();
    const { inputs } = this.models[0];
    /** Name of the input that is the chosen picture: the first image. */
    this.pictureName = inputs.find((input) => input.kind === "image")?.name;
    for (const { name, kind } of inputs.filter((input) => input.name !== this.pictureName)) {
      const label = LABELS[name] ?? name;
      const isPicture = kind === "image";
      const input = isPicture ? this.addFileField(name, label) : this.addTextField(name, label);
      this.inputs.set(name, input);
    }
    this.suggestions = create("div", { class: "chips", role: "group", "aria-label": "Examples" });
    if (this.inputs.has("question")) this.fields.append(this.suggestions);
    if (this.models.some((model) => model.attention)) this.#addAttentionChoice();
  }

  changePicture() {
    super.changePicture();
    const input = this.inputs.get("question");
    if (!input) return;
    const chips = (this.picture.questions ?? []).map((question) =>
      create("button", {
        type: "button",
        text: question,
        onclick: () => {
          input.value = question;
          this.start();
        },
      }),
    );
    this.suggestions.replaceChildren(...(this.picture.blob ? chips : []));
  }

  async start() {
    const inputs = this.#collectInputs();
    if (!inputs) return;
    this.clear();
    this.draw();
    const { model } = this;
    const attention = Boolean(model.attention && this.attentionChoice?.checked);
    await this.run(this.busy, async (options) => {
      const answer = await this.api.predict(model, inputs, { attention, ...options });
      this.#show(answer, inputs.question);
    });
  }

  #collectInputs() {
    const inputs = {};
    if (this.pictureName) {
      inputs[this.pictureName] = this.needPicture();
      if (!this.picture.blob) return null;
    }
    for (const [name, input] of this.inputs) {
      const label = (LABELS[name] ?? name).toLowerCase();
      if (input.type === "file") {
        if (!input.files.length) {
          this.complain(`Choose the ${label} too.`);
          return null;
        }
        inputs[name] = input.files[0];
        continue;
      }
      inputs[name] = this.needText(input, `Type the ${label} first.`);
      if (!inputs[name]) return null;
    }
    return inputs;
  }

  #show(answer, question) {
    const predictions = answer.predictions;
    const parts = [];
    const [best] = predictions;
    if (question) parts.push(create("p", { class: "asked", text: question }));
    if (best?.caption !== undefined) {
      parts.push(create("p", { class: "answer", text: best.caption || "(no words)" }));
      this.say(`Caption: ${best.caption}`, { isShown: true });
    } else if (best && getName(best) !== null && "score" in best) {
      parts.push(create("p", { class: "answer", text: getName(best) }));
      parts.push(renderBars(predictions.slice(0, MAX_CANDIDATES)));
      this.say(`Answer: ${getName(best)}, ${formatPercent(best.score)}`, { isShown: true });
    } else {
      parts.push(create("pre", { tabindex: 0, text: JSON.stringify(predictions, null, 1) }));
      this.say("The answer is here.", { isShown: true });
    }
    if (answer.attention) {
      const view = new AttentionView(answer.attention, this);
      parts.push(view.element);
    }
    parts.push(renderFacts(answer));
    this.result.replaceChildren(...parts);
    this.revealResult();
  }

  #addAttentionChoice() {
    const id = makeId("attention");
    this.attentionChoice = create("input", { type: "checkbox", id, checked: true });
    const label = create("label", { for: id, text: "Show where the words look" });
    this.fields.append(create("div", { class: "check" }, this.attentionChoice, label));
  }
}

function getName(candidate) {
  const name = candidate.answer ?? candidate.name ?? candidate.label;
  return name === undefined ? null : String(name);
}

/** Returns candidates as a list of bars, whose lengths are probabilities. */
export function renderBars(candidates, { format = formatPercent } = {}) {
  const items = candidates.map((candidate) => {
    const meter = create("span", { class: "bar", "aria-hidden": "true" }, create("span"));
    meter.firstChild.style.width = `${100 * Math.min(Math.max(candidate.score, 0), 1)}%`;
    return create(
      "li",
      {},
      create("span", { class: "name", text: getName(candidate) }),
      create("span", { class: "number", text: format(candidate.score) }),
      meter,
    );
  });
  return create("ol", { class: "bars", "aria-label": "Candidates" }, ...items);
}

/** Returns the line that says which weights answered, and how long they took. */
export function renderFacts(answer) {
  const seconds = Number.isFinite(answer.seconds) ? ` in ${answer.seconds.toFixed(2)} s` : "";
  return create("p", { class: "facts", text: `${answer.model ?? "The server"}${seconds}` });
}
