/** The page's one connection: made when the page opens, made again with a key when the server asks for one. */

import { connect } from "./client.js";
import { browserStorage } from "./storage.js";

const KEY = "wsserver.key";
const MODEL = "wsserver.model";
const RETRY_MS = 3000;
const WRONG_KEY = "This key is wrong. Whoever runs the server has the right one.";

/**
 * Events: "state" when `state` or `detail` has changed, "models" when `available`, `loaded` or `model` has, "loading" with how
 * far a load is, "ready" each time a server has answered for the first time.
 */
export class Session extends EventTarget {
  chat = null;
  state = "connecting";
  detail = {};
  available = [];
  loaded = [];
  model = null; // what this connection uses, as `ready` tells it
  limits = null;
  #url;
  #askForKey;
  #retry;
  #starting = false; // or asking for a key

  constructor(url, askForKey) {
    super();
    this.#url = url;
    this.#askForKey = askForKey;
  }

  get hasKey() {
    return browserStorage.getItem(KEY) !== null;
  }

  forgetKey() {
    browserStorage.removeItem(KEY);
  }

  /** Connect, and see what the server has; what is lost later comes back by itself. */
  async start() {
    clearTimeout(this.#retry);
    this.#starting = true;
    this.#enter("connecting");
    try {
      const token = browserStorage.getItem(KEY) ?? undefined;
      this.chat = await connect(this.#url, { token, onState: (state, detail) => this.#changed(state, detail) });
      this.dispatchEvent(new Event("state")); // it was open before there was something to ask
      await Promise.all([this.#chooseAsBefore(), this.#meet()]);
    } catch (error) {
      await this.#failed(error);
    } finally {
      this.#starting = false;
    }
  }

  /** Use the model of an earlier visit, or the server's own where that is gone or fails. */
  async #chooseAsBefore() {
    const id = browserStorage.getItem(MODEL);
    if (!id) return this.choose();
    try {
      await this.choose(id);
    } catch (error) {
      if (error.code === "unauthenticated") throw error;
      if (error.code === "model_not_found") browserStorage.removeItem(MODEL);
      else this.#tell("problem", error);
      await this.choose();
    }
  }

  async #meet() {
    await this.refresh();
    this.dispatchEvent(new Event("ready"));
  }

  /** Try again now. */
  reconnect() {
    if (this.chat?.state === "connecting") this.chat.reconnect();
    else if (this.state !== "open" && !this.#starting) this.start();
  }

  /** Ask what there is. */
  async refresh() {
    const { available, models } = await this.chat.status();
    this.available = available;
    this.loaded = models.filter(({ state }) => state === "ready").map(({ id }) => id);
    this.dispatchEvent(new Event("models"));
  }

  /** Use a model from now on, the server's own if none is named. */
  async choose(id) {
    try {
      const onFrame = (frame) => frame.type === "loading" && this.#tell("loading", frame);
      const ready = await this.chat.init(id ? { model: id } : {}, { onFrame });
      this.model = ready.model;
      this.limits = ready.limits;
      if (id) browserStorage.setItem(MODEL, id);
      await this.refresh();
    } finally {
      this.#tell("loading", null);
      this.dispatchEvent(new Event("models"));
    }
  }

  #changed(state, detail) {
    this.#enter(state, detail);
    if (state === "closed" && !this.#starting) this.#failed(detail.error);
  }

  async #failed(error) {
    if (error.code === "unauthenticated") {
      this.#starting = true;
      this.chat?.close();
      this.#enter("closed", { error: new Error("A key is needed") });
      browserStorage.setItem(KEY, await this.#askForKey(this.hasKey ? WRONG_KEY : ""));
      await this.start();
    } else if (error.code === "unreachable") {
      this.#enter("connecting", { reason: error.message, retryInMs: RETRY_MS });
      this.#retry = setTimeout(() => this.start(), RETRY_MS);
    } else if (this.chat?.state === "open") this.#tell("problem", error);
  }

  #enter(state, detail = {}) {
    this.state = state;
    this.detail = detail;
    this.dispatchEvent(new Event("state"));
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
