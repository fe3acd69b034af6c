/** One answer on its way into a conversation: asks, collects what comes, and keeps it. Knows no elements. */

import { keep } from "./conversations.js";
import { tabStorage } from "./storage.js";

const RUNNING = "wsserver.running"; // in the tab: another tab does not take up this one's answers
const KEEP_EVERY_MS = 1000;

/**
 * Events: "text" with new text, "restart" when the text begins anew, "wait" when `wait` has changed, "end" when it is over.
 * What is told of the reply for later is in the reply itself: its text, its end, its times, its error.
 */
export class Turn extends EventTarget {
  wait = "";
  #stop = new AbortController();
  #kept = 0;
  #discarded = false;

  constructor(conversation, reply) {
    super();
    this.conversation = conversation;
    this.reply = reply;
  }

  /** Ask for the reply, which is the conversation's last message. */
  async ask(session) {
    const { settings, messages } = this.conversation;
    const { system, ...sampling } = settings;
    const told = messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
    const request = { messages: [...(system ? [{ role: "system", content: system }] : []), ...told], ...sampling };
    const problem = tooLong(request, session.limits);
    if (problem) return this.#end(problem);
    await this.#follow(session.chat.generate(request, this.#options()));
  }

  /** Take up the reply where this tab, loaded anew, had left it. */
  async resume(session, { id, resumeToken }) {
    this.reply.content = "";
    this.dispatchEvent(new Event("restart"));
    await this.#follow(session.chat.resume({ id, resumeToken }, this.#options()));
  }

  stop() {
    this.#stop.abort();
  }

  /** Stop it, and keep no more of its conversation, which was deleted. */
  discard() {
    this.#discarded = true;
    this.stop();
  }

  #options() {
    return { signal: this.#stop.signal, onFrame: (frame) => this.#hear(frame) };
  }

  async #follow(answer) {
    try {
      for await (const text of answer) {
        this.reply.content += text;
        this.#tell("text", text);
        if (Date.now() - this.#kept > KEEP_EVERY_MS) this.#keep();
      }
      this.#end(null, answer.done);
    } catch (error) {
      this.#end(error, answer.done);
    }
  }

  #hear(frame) {
    if (frame.type === "started") {
      this.reply.model = frame.model;
      remember(this.conversation.id, { id: frame.id, resumeToken: frame.resume_token });
    }
    const wait = WAITS[frame.type]?.(frame) ?? "";
    if (wait === this.wait) return;
    this.wait = wait;
    this.#tell("wait", wait);
  }

  #end(error, done) {
    Object.assign(this.reply, { end: done?.finish_reason ?? "error", usage: done?.usage, timings: done?.timings });
    if (error) this.reply.error = { code: error.code, message: error.message, retryAfterMs: error.retryAfterMs };
    forget(this.conversation.id);
    this.#keep();
    this.#tell("end");
  }

  #keep() {
    this.#kept = this.conversation.changed = Date.now();
    if (!this.#discarded) keep(this.conversation);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** What this tab, before it was loaded anew, was in the middle of: by the conversation's id. */
export const unfinished = () => JSON.parse(tabStorage.getItem(RUNNING) ?? "{}");

const WAITS = {
  queued: ({ position }) => `Waiting in line, place ${position}`,
  started: () => "Reading the question",
  prefill: ({ done, total }) => `Reading the question, ${Math.round((100 * done) / total)} %`,
};

function remember(id, begun) {
  tabStorage.setItem(RUNNING, JSON.stringify({ ...unfinished(), [id]: begun }));
}

function forget(id) {
  const { [id]: _, ...others } = unfinished();
  tabStorage.setItem(RUNNING, JSON.stringify(others));
}

function tooLong(request, limits) {
  // The server hangs up on who sends more, so it is not sent.
  const bytes = new TextEncoder().encode(JSON.stringify(request)).length + 128;
  if (!limits || bytes <= limits.max_message_bytes) return null;
  return { code: "context_length_exceeded", message: "This conversation is too long to be sent; begin a new one." };
}
