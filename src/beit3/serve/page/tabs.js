/* Tabs as the ARIA practices describe them: one is in the tab order, arrow keys change it. */

import { create } from "./dom.js";

export class Tabs {
  /**
   * @param {HTMLElement} list Has the role tablist.
   * @param {HTMLElement} panels Holds the panels.
   */
  constructor(list, panels) {
    this.list = list;
    this.panels = panels;
    this.onChange = () => {};
    list.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Adds a tab and its panel; the first one is selected. */
  add(id, title, content) {
    const tab = create("button", {
      type: "button",
      role: "tab",
      id: `tab-${id}`,
      "aria-controls": `panel-${id}`,
      text: title,
      onclick: () => this.select(id),
    });
    const panel = create(
      "div",
      { role: "tabpanel", id: `panel-${id}`, "aria-labelledby": tab.id, class: "panel" },
      content,
    );
    this.list.append(tab);
    this.panels.append(panel);
    if (this.list.children.length === 1) this.select(id);
    else this.#mark(tab, panel, false);
  }

  /** Removes all tabs. */
  clear() {
    this.list.replaceChildren();
    this.panels.replaceChildren();
  }

  /** Shows the panel of a tab. */
  select(id) {
    for (const tab of this.list.children) {
      const panel = document.getElementById(tab.getAttribute("aria-controls"));
      this.#mark(tab, panel, tab.id === `tab-${id}`);
    }
    this.onChange(id);
  }

  #mark(tab, panel, isSelected) {
    tab.setAttribute("aria-selected", String(isSelected));
    tab.tabIndex = isSelected ? 0 : -1;
    panel.hidden = !isSelected;
  }

  #onKey(event) {
    const tabs = [...this.list.children];
    const index = tabs.indexOf(document.activeElement);
    const targets = {
      ArrowRight: (index + 1) % tabs.length,
      ArrowLeft: (index + tabs.length - 1) % tabs.length,
      Home: 0,
      End: tabs.length - 1,
    };
    if (index < 0 || !(event.key in targets)) return;
    event.preventDefault();
    const tab = tabs[targets[event.key]];
    tab.click();
    tab.focus();
  }
}
