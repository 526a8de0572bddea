/* The picture: chosen, dropped, pasted, an example or one of the index; and what is drawn on it. */

import { create, formatCount } from "./dom.js";

const MAX_SHARP_WIDTH = 96; // a wider picture is smoothed when it is enlarged, as in reports

export class Picture {
  /** @param {Api} api */
  constructor(api) {
    this.api = api;
    this.blob = null;
    this.width = 0;
    this.height = 0;
    this.onChange = () => {};
    this.frame = document.getElementById("frame");
    this.drop = document.getElementById("drop");
    this.file = document.getElementById("file");
    this.image = create("img", { alt: "" });
    this.#listen();
  }

  /**
   * Takes a picture; one that the browser cannot show is refused in words.
   * @param {Blob} blob
   * @param {{name?: string, alt?: string, questions?: string[]}} about
   */
  async set(blob, { name = blob.name ?? "pasted picture", alt = "", questions = [] } = {}) {
    this.say("");
    const url = URL.createObjectURL(blob);
    const image = create("img", { alt: alt || `The chosen picture, ${name}` });
    image.src = url;
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(url);
      this.complain(`${name} is no picture that this browser can show: take a JPEG, PNG or WebP.`);
      return false;
    }
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    Object.assign(this, { blob, image, name, alt, questions });
    this.width = image.naturalWidth;
    this.height = image.naturalHeight;
    image.classList.toggle("sharp", this.isSharp);
    this.frame.style.aspectRatio = `${this.width} / ${this.height}`;
    this.frame.style.setProperty("--ratio", this.width / this.height);
    this.draw();
    this.#showState();
    this.onChange();
    this.say(`${name} is chosen.`);
    return true;
  }

  /** Whether its pixels are so few that they are shown as squares. */
  get isSharp() {
    return this.width <= MAX_SHARP_WIDTH;
  }

  /** Forgets the picture. */
  remove() {
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    this.blob = null;
    this.image = create("img", { alt: "" });
    this.draw();
    this.#showState();
    this.say("The picture is removed.");
    this.onChange();
    document.getElementById("choose").focus();
  }

  /** Draws elements over the picture, in place of what was drawn before. */
  draw(...layers) {
    this.frame.replaceChildren(this.image, ...layers);
    this.drop.classList.toggle("drawn", layers.length > 0);
  }

  /** Brings the picture into view, where it is outside the window. */
  reveal() {
    const { top, bottom } = this.frame.getBoundingClientRect();
    if (top < 0 || bottom > window.innerHeight) this.frame.scrollIntoView({ block: "nearest" });
  }

  /** Offers pictures to try: [{file, alt, questions}] beside this page. */
  async offerExamples(examples) {
    const list = document.querySelector("#examples ul");
    for (const example of examples) {
      const url = `page/${example.file}`;
      const choose = async () => {
        try {
          await this.set(await this.api.loadPicture(url), { ...example, name: example.alt });
        } catch (error) {
          this.complain(error.message);
        }
      };
      const image = create("img", { src: url, alt: example.alt, class: "sharp" });
      const button = create("button", { type: "button", class: "thumb", onclick: choose }, image);
      list.append(create("li", {}, button));
    }
    document.getElementById("examples").hidden = !examples.length;
  }

  say(message) {
    document.getElementById("picture-status").textContent = message;
    document.getElementById("picture-error").textContent = "";
  }

  complain(message) {
    document.getElementById("picture-error").textContent = message;
  }

  #showState() {
    const isChosen = this.blob !== null;
    this.frame.hidden = !isChosen;
    document.getElementById("empty").hidden = isChosen;
    document.getElementById("remove").hidden = !isChosen;
    document.getElementById("choose").classList.toggle("primary", !isChosen);
    document.getElementById("choose").textContent = isChosen
      ? "Choose another"
      : "Choose a picture";
    document.getElementById("facts").textContent = isChosen
      ? `${this.name} · ${this.width} × ${this.height} pixels`
      : "";
  }

  #listen() {
    document.getElementById("choose").addEventListener("click", () => this.file.click());
    document.getElementById("remove").addEventListener("click", () => this.remove());
    this.file.addEventListener("change", () => {
      this.#take(this.file.files);
      this.file.value = "";
    });
    // A file that is dropped beside the box would replace the page.
    for (const name of ["dragover", "drop"]) {
      window.addEventListener(name, (event) => event.preventDefault());
    }
    window.addEventListener("dragover", () => this.drop.classList.add("over"));
    window.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) this.drop.classList.remove("over");
    });
    window.addEventListener("drop", (event) => {
      this.drop.classList.remove("over");
      this.#take(event.dataTransfer.files);
    });
    window.addEventListener("paste", (event) => {
      const files = event.clipboardData?.files ?? [];
      if (!files.length) return;
      event.preventDefault();
      this.#take(files);
    });
  }

  async #take(files) {
    if (!files.length) return;
    if (!(await this.set(files[0]))) return;
    if (files.length > 1) {
      this.say(`${files[0].name} is chosen; ${formatCount(files.length - 1, "file")} left out.`);
    }
  }
}
