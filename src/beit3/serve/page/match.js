/* How well texts fit the picture: the similarity of their features. */

import { toDataUri } from "./api.js";
import { renderBars, renderFacts } from "./answers.js";
import { create } from "./dom.js";
import { Panel } from "./panel.js";

export class MatchPanel extends Panel {
  constructor(context, models) {
    super(context, {
      models,
      lead: "Compares texts with the picture, and puts the one that fits best first.",
      action: "Compare",
    });
    this.texts = this.addTextField("input", "Texts, one per line", { rows: 4 });
  }

  async start() {
    const blob = this.needPicture();
    if (!blob) return;
    const text = this.needText(this.texts, "Type one or more texts first.");
    if (!text) return;
    this.clear();
    const texts = [...new Set(text.split("\n").map((line) => line.trim()))].filter(Boolean);
    const { model } = this;
    await this.run("Comparing …", async (options) => {
      const input = [{ image: await toDataUri(blob) }, ...texts];
      const query = { input, model: model.name };
      const answer = await this.api.postJson("v1/embeddings", query, options);
      const [image, ...features] = answer.data.map((item) => normalize(item.embedding));
      const candidates = texts.map((answer, index) => ({
        answer,
        score: features[index].reduce((sum, value, i) => sum + value * image[i], 0),
      }));
      candidates.sort((first, second) => second.score - first.score);
      const bars = renderBars(candidates, { format: (value) => value.toFixed(3) });
      const hint = create("p", { class: "hint", text: "Cosine similarity, -1 to 1." });
      this.result.replaceChildren(bars, hint, renderFacts(answer));
      this.revealResult();
      this.say(`“${candidates[0].answer}” fits best.`, { isShown: true });
    });
  }
}

function normalize(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}
