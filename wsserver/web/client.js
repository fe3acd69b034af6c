/**
 * The client in JavaScript, for browsers and Node: one connection, which is made anew when it is lost, and the answers on it.
 * It speaks protocol.md; its types are in client.d.ts. It knows no page and stores nothing.
 */

// Close codes after which coming back would change nothing, and what they are told as; after all others it comes back.
const HUNG_UP = { 1002: "closed", 1003: "closed", 1007: "closed", 1009: "closed", 4400: "closed" };
const UNWANTED = { 4401: "unauthenticated", 4403: "forbidden", 4408: "unauthenticated" };
const FINAL = { ...HUNG_UP, ...UNWANTED };
const RATE_LIMITED = 4429;

const SHORTEST_DELAY = 500;
const LONGEST_DELAY = 30_000;
const LOOKS = 3; // at a connection on which something is waited for, before it counts as dead

const newId = () => Math.random().toString(36).slice(2);

/** Why a request or the connection failed. */
export class ServerError extends Error {
  name = "ServerError";

  constructor({ code, message, retry_after_ms }) {
    super(message);
    this.code = code;
    this.retryAfterMs = retry_after_ms;
  }
}

/** Connect to a server's /ws; rejects if that fails. A connection that is lost later is made anew, for as long as it takes. */
export const connect = (url, options = {}) => new Promise((opened, failed) => new Chat(url, options, opened, failed));

class Chat {
  state = "connecting";
  error = null; // why it is closed
  #url;
  #options;
  #opened;
  #failed;
  #socket;
  #wasOpen = false;
  #keyShown; // on this socket
  // What may say, oldest first, which model the next answer comes from: the last load that got ready, and later ones.
  #loads = [];
  #places = 0;
  #asked = new Map(); // what waits for frames, by id
  #statuses = []; // who waits for a status, oldest first
  #parting = []; // what is still to be said of answers that nobody waits for
  #failures = 0; // in a row, with nothing heard in between
  #retry;
  #looks;
  #silent = 0; // looks since something was heard

  constructor(url, options, opened, failed) {
    [this.#url, this.#options, this.#opened, this.#failed] = [url, options, opened, failed];
    this.#connect();
  }

  /** Ask for an answer, at once; iterate over what comes back for its text, piece by piece as it comes. */
  generate(request, options = {}) {
    return this.#ask(new Answer({ type: "generate", id: newId(), resumable: true, ...request }, options));
  }

  /** Take up an answer that was begun on another connection; `begun` is that answer, or what was kept of it. */
  resume(begun, options = {}) {
    return this.#ask(new Answer({ type: "generate", id: begun.id, resumable: true }, options, begun));
  }

  /** Choose the model of this connection, and load it where needed. */
  init(request = {}, options = {}) {
    return new Promise((resolve, reject) => {
      const load = new Load({ type: "init", id: newId(), ...request }, options, resolve, reject);
      this.#loads.push(load);
      this.#ask(load);
    });
  }

  /** Ask what the server is doing. */
  status() {
    return new Promise((resolve, reject) => {
      if (this.error) return reject(this.error);
      this.#statuses.push({ resolve, reject });
      this.say({ type: "status" });
    });
  }

  /** Try again now rather than after the delay: somebody knows that the network is back. */
  reconnect() {
    if (!this.#retry) return;
    clearTimeout(this.#retry);
    this.#connect();
  }

  /** Stop everything, and hang up. */
  close() {
    if (this.#asked.size) this.say({ type: "cancel" });
    this.#end(new ServerError({ code: "closed", message: "the client has hung up" }));
  }

  // For what was asked.

  /** Send a message; what is asked while there is no connection is asked once there is one. */
  say(message) {
    if (this.state !== "open") return;
    if (message.type !== "init") this.#showKey();
    const key = this.#keyShown ? null : { token: this.#options.token };
    this.#keyShown = true;
    this.#socket.send(JSON.stringify({ ...message, ...key }));
  }

  /** Forget what has ended; `parting` is still to be said of it. */
  over(asked, ...parting) {
    this.#asked.delete(asked.message.id);
    if (this.state === "open") parting.forEach((message) => this.say(message));
    else this.#parting.push(...parting);
  }

  /** A load has ended: one that got ready takes the place of those before it, one that failed leaves them. */
  loaded(load) {
    const place = this.#loads.indexOf(load);
    if (place >= 0) this.#loads.splice(load.isReady ? 0 : place, load.isReady ? place : 1);
  }

  /** Whether the next answer would come from the same model. */
  chooses(load) {
    return this.#loads.at(-1) === load;
  }

  #ask(asked) {
    asked.chat = this;
    asked.place = this.#places++;
    if (asked instanceof Answer) asked.load = this.#loads.at(-1);
    if (this.error) asked.fail(this.error);
    else if (asked.begin()) {
      this.#asked.set(asked.message.id, asked);
      this.say(asked.question);
    }
    return asked;
  }

  // The connection.

  #connect() {
    this.#retry = null;
    this.#socket = new WebSocket(this.#url, ["llmstream.v1"]);
    this.#socket.onopen = () => this.#greet();
    this.#socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
    this.#socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    // Some versions of Node do not tell the close of a connection that never was.
    this.#socket.onerror = () => this.state === "open" || this.#lost(1006, "");
  }

  #greet() {
    this.#wasOpen = true;
    this.#silent = 0;
    const { token, patience = 20_000 } = this.#options;
    this.#keyShown = !token;
    this.#looks = setInterval(() => this.#look(), patience / LOOKS);
    this.state = "open";
    for (const message of this.#parting.splice(0)) this.say(message);
    const waiting = [...this.#asked.values()].filter(({ load, resumeToken }) => load && !resumeToken);
    for (const asked of waiting) if (asked.load.failure) asked.fail(asked.load.failure); // its model is not to be had anew
    const loads = waiting.map(({ load }) => load).filter(({ failure }) => !failure);
    const all = new Set([...this.#asked.values(), ...loads, ...this.#loads]);
    // In the order of asking, each is said behind what chose its model, which may not be what chooses the next one's.
    for (const { question } of [...all].sort((one, other) => one.place - other.place)) this.say(question);
    for (const _ of this.#statuses) this.say({ type: "status" });
    this.#enter("open");
    this.#opened(this);
    setTimeout(() => this.#showKey()); // whoever has just got this may begin with an init
  }

  /** Show it in an init, which is answered by name if it is wrong: why a handshake was refused nobody tells a page. */
  #showKey() {
    if (!this.#keyShown) this.say({ type: "init" });
  }

  #hear(frame) {
    this.#silent = this.#failures = 0;
    const asked = this.#asked.get(frame.id);
    if (frame.type === "status") this.#statuses.shift()?.resolve(frame);
    else if (asked) asked.hear(frame);
    else if (frame.type === "error") this.#refused(frame);
  }

  #refused(frame) {
    if (!frame.id) this.#statuses.shift()?.reject(new ServerError(frame));
    // What is asked from now on would get another model's answer.
    else if (frame.code !== "not_active" && this.#loads.some(({ message }) => message.id === frame.id)) {
      this.#end(new ServerError(frame));
    }
  }

  /** A dead network tells nothing, and a page cannot send pings: who waits in silence asks for a status. */
  #look() {
    if (!this.#asked.size && !this.#statuses.length) this.#silent = 0;
    else if (++this.#silent === LOOKS) this.#lost(1006, "nothing was heard");
    else if (this.#silent === LOOKS - 1) this.status().catch(() => {});
  }

  #lost(code, reason) {
    const told = reason || `the connection was closed with ${code}`;
    this.state = "connecting";
    this.#hangUp();
    if (FINAL[code]) return this.#end(new ServerError({ code: FINAL[code], message: told }));
    if (!this.#wasOpen) {
      return this.#end(new ServerError({ code: "unreachable", message: `${this.#url} takes no connection` }));
    }
    for (const asked of this.#asked.values()) asked.lost(told);
    const longest = Math.min(LONGEST_DELAY, SHORTEST_DELAY * 2 ** this.#failures++);
    const retryInMs = (longest * (1 + Math.random())) / 2 + (code === RATE_LIMITED ? 60_000 : 0);
    this.#retry = setTimeout(() => this.#connect(), retryInMs);
    this.#enter("connecting", { retryInMs, reason: told });
  }

  #end(error) {
    if (this.error) return;
    this.error = error;
    this.#hangUp();
    this.#enter("closed", { error });
    this.#failed(error);
    for (const asked of this.#asked.values()) asked.fail(error);
    for (const { reject } of this.#statuses.splice(0)) reject(error);
  }

  #hangUp() {
    clearInterval(this.#looks);
    clearTimeout(this.#retry);
    this.#retry = null;
    if (!this.#socket) return;
    this.#socket.onopen = this.#socket.onmessage = this.#socket.onclose = this.#socket.onerror = null;
    this.#socket.close();
  }

  #enter(state, detail = {}) {
    this.state = state;
    this.#options.onState?.(state, detail);
  }
}

/** What was asked under an id: its frames, its one end, and what stops it. */
class Asked {
  constructor(message, { signal, onFrame }) {
    this.message = message;
    this.signal = signal;
    this.onFrame = onFrame;
    this.cancelled = false;
    this.ended = new Promise((ended) => (this.end = ended));
    this.stop = () => this.cancel();
  }

  /** Listen to the signal; false if it says that there is nothing to ask. */
  begin() {
    if (this.signal?.aborted) this.leave();
    else this.signal?.addEventListener("abort", this.stop);
    return !this.signal?.aborted;
  }

  /** Have it stopped; resolves once it has ended, which without a connection is now. */
  cancel() {
    if (!this.cancelled) {
      this.cancelled = true;
      if (this.chat.state === "open") this.chat.say({ type: "cancel", id: this.message.id });
      else this.leave();
    }
    return this.ended;
  }

  over(...parting) {
    this.cancelled = true;
    this.signal?.removeEventListener("abort", this.stop);
    this.chat.over(this, ...parting);
    this.end();
  }
}

class Load extends Asked {
  isReady = false;
  failure = null;

  constructor(message, options, ready, failed) {
    super(message, options);
    this.question = message;
    this.ready = ready;
    this.failed = failed;
  }

  hear(frame) {
    this.onFrame?.(frame);
    if (frame.type === "error") this.fail(new ServerError(frame));
    else if (frame.type === "ready") {
      this.isReady = true;
      this.chat.loaded(this);
      this.ready(frame);
      this.over();
    }
  }

  lost() {
    if (this.cancelled) this.leave();
  }

  leave() {
    this.fail(new ServerError({ code: "cancelled", message: "the load was cancelled" }));
  }

  fail(error) {
    this.failure = error;
    this.chat.loaded(this);
    this.failed(error);
    this.over();
  }
}

class Answer extends Asked {
  done = null; // the frame that ended it
  #text = ""; // what came and was not taken yet
  #error = null;
  #wake = null;

  constructor(message, options, { resumeToken = null, nextSeq = 0 } = {}) {
    super(message, options);
    this.id = message.id;
    this.resumeToken = resumeToken;
    this.nextSeq = nextSeq;
  }

  get question() {
    const { id, resumeToken, nextSeq } = this;
    return resumeToken ? { type: "resume", id, resume_token: resumeToken, after_seq: nextSeq } : this.message;
  }

  /** The whole text, once it is there. */
  async text() {
    let whole = "";
    for await (const piece of this) whole += piece;
    return whole;
  }

  /** The text, in pieces as they come; a loop that is left stops the answer. */
  async *[Symbol.asyncIterator]() {
    try {
      while (this.#text || !this.done) {
        const piece = this.#text;
        this.#text = "";
        if (piece) yield piece;
        else if (this.#error) break;
        else await new Promise((wake) => (this.#wake = wake));
      }
      if (this.#error) throw this.#error;
    } finally {
      await this.cancel();
    }
  }

  hear(frame) {
    this.onFrame?.(frame);
    if (frame.type === "started") this.resumeToken = frame.resume_token;
    else if (frame.type === "token") {
      this.nextSeq = frame.seq + frame.n;
      this.#take(frame.text);
    } else if (frame.type === "done") {
      if (frame.error) this.#error = new ServerError(frame.error);
      this.#finish(frame, frame.text);
    } else if (frame.type === "detached") {
      this.fail(new ServerError({ code: "detached", message: "the answer was taken up elsewhere" }));
    } else if (frame.type === "error") this.#refused(frame);
  }

  lost(why) {
    if (this.cancelled) this.leave();
    else if (!this.message.resumable) this.fail(new ServerError({ code: "connection_lost", message: why }));
  }

  /** End it as cancelled here; the server, where it may go on, is told when there is a connection. */
  leave() {
    const parting = this.resumeToken ? [this.question, { type: "cancel", id: this.id }] : [];
    this.#finish({ type: "done", id: this.id, finish_reason: "cancelled" }, "", parting);
  }

  fail(error) {
    this.#error = error;
    this.#finish(null);
  }

  #refused(frame) {
    const canAskAnew = this.chat.chooses(this.load) && ("messages" in this.message || "prompt" in this.message);
    if (frame.code === "resume_expired" && !this.nextSeq && canAskAnew) {
      this.resumeToken = null;
      this.chat.say(this.question);
    } else if (frame.code !== "not_active") this.fail(new ServerError(frame)); // else a cancel came too late
  }

  #finish(done, text = "", parting = []) {
    this.done = done;
    this.over(...parting);
    this.#take(text);
  }

  #take(text) {
    this.#text += text;
    this.#wake?.();
  }
}
