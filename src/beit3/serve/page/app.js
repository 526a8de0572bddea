/* Asks the server what it can do, and shows a tool for each task that it has. */

import { AnswerPanel } from "./answers.js";
import { Api } from "./api.js";
import { create } from "./dom.js";
import { MatchPanel } from "./match.js";
import { ObjectsPanel } from "./objects.js";
import { Picture } from "./picture.js";
import { SearchPanel } from "./search.js";
import { SegmentsPanel } from "./segments.js";
import { Tabs } from "./tabs.js";

const ANSWERS = {
  vqa: {
    title: "Ask",
    lead: "Ask a question about the picture; the answer is one of those the weights know.",
    action: "Ask",
    busy: "Looking for an answer …",
  },
  captioning: {
    title: "Caption",
    lead: "Describes the picture in a sentence.",
    action: "Write a caption",
    busy: "Writing a caption …",
  },
  imagenet: {
    title: "Classify",
    lead: "Says what the picture shows, as one of the classes that the weights know.",
    action: "Classify",
    busy: "Classifying …",
  },
  nlvr2: {
    title: "Judge",
    lead: "Judges whether a statement is true of two pictures, this one on the left.",
    action: "Judge",
    busy: "Judging …",
  },
};

/** Task -> its tool, in the order of the tabs. The index's search stands before `retrieval`. */
const TOOLS = {
  vqa: makeAnswerTool,
  captioning: makeAnswerTool,
  coco: (models) => ["Objects", new ObjectsPanel(context, models)],
  ade20k: (models) => ["Regions", new SegmentsPanel(context, models)],
  imagenet: makeAnswerTool,
  nlvr2: makeAnswerTool,
  retrieval: (models) => ["Match", new MatchPanel(context, models)],
};

const api = new Api();
const picture = new Picture(api);
const context = { api, picture };
const tabs = new Tabs(document.getElementById("tablist"), document.getElementById("panels"));
const panels = new Map();

function makeAnswerTool(models) {
  const { task } = models[0];
  const words = ANSWERS[task] ?? {
    title: task,
    lead: `Runs the task ${task}.`,
    action: "Run",
    busy: "Running …",
  };
  return [words.title, new AnswerPanel(context, { ...words, models })];
}

/** Asks for the server's tasks and builds the page; with a wrong token asks for the right one. */
async function connect() {
  const status = document.getElementById("page-status");
  const error = document.getElementById("page-error");
  const form = document.getElementById("token-form");
  error.textContent = "";
  try {
    const onWait = () => {
      status.textContent = "The server is loading its weights …";
    };
    const { models, index } = readModels(await api.listModels({ onWait }));
    form.hidden = true;
    build(models, index);
    status.textContent = "";
  } catch (problem) {
    status.textContent = "";
    if (problem.status === 401) {
      const wasHidden = form.hidden;
      form.hidden = false;
      if (!wasHidden) error.textContent = "This token is wrong.";
      document.getElementById("token").focus();
    } else {
      error.textContent = problem.message;
      error.append(" ", create("button", { type: "button", text: "Try again", onclick: connect }));
    }
  }
}

/** Returns the weights, a row for each task of each, and the index, or null. */
function readModels(answer) {
  const models = [];
  for (const item of answer.data ?? []) {
    const { id: name, task, path, inputs = [], attention = false, classes = [] } = item;
    if (task) models.push({ name, task, path, inputs, attention, classes });
  }
  // Without its weights an index finds nothing by words or pictures.
  return { models, index: answer.index?.model ? answer.index : null };
}

function build(models, index) {
  tabs.clear();
  panels.clear();
  tabs.onChange = (id) => picture.draw(...(panels.get(id)?.layers ?? []));
  const byTask = groupByTask(models);
  const rest = [...byTask.keys()].filter((task) => !(task in TOOLS));
  for (const task of [...Object.keys(TOOLS), ...rest]) {
    if (task === "retrieval" && index) add("search", "Search", new SearchPanel(context, index));
    const taskModels = byTask.get(task);
    if (!taskModels || !(task in TOOLS || taskModels[0].inputs.length)) continue;
    const [title, panel] = (TOOLS[task] ?? makeAnswerTool)(taskModels);
    add(task, title, panel);
  }
  if (!panels.size) {
    document.getElementById("page-error").textContent =
      "This server has no weights that the page can use: start it with beit3 serve WEIGHTS.";
  }
  showWeights(models);
}

function add(id, title, panel) {
  panels.set(id, panel);
  tabs.add(id, title, panel.element);
  panel.changePicture();
}

function groupByTask(models) {
  const byTask = new Map();
  for (const model of models) byTask.set(model.task, [...(byTask.get(model.task) ?? []), model]);
  return byTask;
}

function showWeights(models) {
  const rows = models.map(({ name, task }) =>
    create("tr", {}, create("td", { text: name }), create("td", { text: task })),
  );
  document.querySelector("#weights tbody").replaceChildren(...rows);
  document.getElementById("weights").hidden = !models.length;
}

/** Shows the description of the endpoints, which a link alone cannot fetch with the token. */
async function showDocs(event) {
  if (!api.token) return;
  event.preventDefault();
  const error = document.getElementById("page-error");
  try {
    const text = await (await api.request("docs")).text();
    const docs = new DOMParser().parseFromString(text, "text/html");
    document.title = docs.title;
    document.body.replaceChildren(...docs.body.children);
    window.scrollTo(0, 0);
  } catch (problem) {
    error.textContent = problem.message;
  }
}

async function loadExamples() {
  try {
    const response = await fetch("page/examples.json");
    if (response.ok) await picture.offerExamples(await response.json());
  } catch {
    // The page works without them.
  }
}

picture.onChange = () => panels.forEach((panel) => panel.changePicture());
document.getElementById("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setToken(document.getElementById("token").value.trim());
  connect();
});
document.querySelector('nav a[href="docs"]').addEventListener("click", showDocs);
loadExamples();
connect();
