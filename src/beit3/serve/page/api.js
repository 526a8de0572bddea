/* Requests to the server: errors in words, waiting where the server is busy, the token. */

const MAX_TRIES = 6;
const DEFAULT_WAIT_SECONDS = 1;
const MAX_WAIT_SECONDS = 30;
const TOKEN_KEY = "beit3-token";

const WORDS = {
  401: "The server wants its token, or the token is wrong.",
  404: "The server does not have this: reload the page.",
  408: "The picture took too long to arrive: try again.",
  413: "This is larger than the server accepts: take a smaller picture or a shorter text.",
  415: "The server cannot read this kind of file: take a JPEG, PNG or WebP.",
  503: "The server is busy: try again in a moment.",
  504: "The server did not finish in time: try again, or take a smaller picture.",
};

/** An answer of the server that is no result. Its message is one line for people. */
export class ServerError extends Error {
  constructor(status, message, field = null) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

export class Api {
  constructor() {
    this.token = sessionStorage.getItem(TOKEN_KEY) ?? "";
  }

  /** Keeps the token until the tab is closed. */
  setToken(token) {
    this.token = token;
    sessionStorage.setItem(TOKEN_KEY, token);
  }

  /** Returns what the server offers, the JSON of GET /v1/models, once it has loaded its weights. */
  async listModels(options = {}) {
    return (await this.request("v1/models", { maxTries: Infinity, ...options })).json();
  }

  /**
   * Runs a task and returns its JSON answer.
   * @param {{name: string, task: string, path: string}} model
   * @param {Object} inputs Name -> text or Blob.
   * @param {Object} options `signal`, `onWait`, and `attention`: whether to ask for maps of words.
   */
  async predict(model, inputs, { attention = false, ...options } = {}) {
    const body = new FormData();
    for (const [name, value] of Object.entries(inputs)) {
      if (value instanceof Blob) body.append(name, value, value.name ?? "picture");
      else body.append(name, value);
    }
    const path = attention ? `${model.path}?attention=true` : model.path;
    return (await this.request(makeRelative(path), { method: "POST", body, ...options })).json();
  }

  /** Sends JSON and returns the JSON answer. */
  async postJson(path, value, options = {}) {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify(value);
    return (await this.request(path, { method: "POST", body, headers, ...options })).json();
  }

  /** Returns a picture of the server as a Blob. */
  async loadPicture(url, options = {}) {
    return (await this.request(makeRelative(url), options)).blob();
  }

  /**
   * Sends a request; where the server is busy, again after as long as it says.
   * `onWait(seconds)` is called before each wait. Throws ServerError, or AbortError when canceled.
   */
  async request(path, options = {}) {
    const { method = "GET", body, headers = {}, signal, onWait, maxTries = MAX_TRIES } = options;
    const authorization = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    for (let attempt = 1; ; attempt += 1) {
      const response = await send(path, {
        method,
        body,
        signal,
        headers: { ...headers, ...authorization },
      });
      if (response.ok) return response;
      if (response.status !== 503 || attempt === maxTries) throw await readError(response);
      const seconds = readWait(response);
      onWait?.(seconds);
      await wait(seconds, signal);
    }
  }
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const message = "The server does not answer: check that it is running, then try again.";
    throw new ServerError(0, message);
  }
}

async function readError(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // The answer of something between the page and the server, a proxy for one, is no JSON.
  }
  const fallback = WORDS[response.status] ?? `The server answered with error ${response.status}.`;
  return new ServerError(response.status, error.message || fallback, error.field);
}

function readWait(response) {
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  if (!Number.isFinite(seconds)) return DEFAULT_WAIT_SECONDS;
  return Math.min(Math.max(seconds, 0), MAX_WAIT_SECONDS);
}

function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("canceled", "AbortError"));
    });
  });
}

/** Returns a path of the server as one beside this page, which may stand below another path. */
export function makeRelative(path) {
  return path.replace(/^\//, "");
}

/** Returns a Blob as a data URI. */
export function toDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture can no longer be read: choose it again."));
    reader.readAsDataURL(blob);
  });
}
