/** The messages of a conversation, as elements. Knows no connection: what its buttons mean is for others to say. */

import { copyButton } from "./clipboard.js";
import { Markdown } from "./markdown.js";

const ENDS = {
  length: "reached the most tokens that were allowed",
  cancelled: "stopped",
  timeout: "took longer than the server allows",
  shutdown: "cut off, the server stops",
};
const UNTOLD = "Cut off: this page was closed in the middle.";
const PROBLEMS = {
  resume_expired: "Cut off: the server has lost this answer, perhaps by a restart.",
  detached: "This answer goes on in another tab.",
};

/** One message; `on` has what its buttons do, `edit(text)` and `again()`. */
export class MessageView {
  #message;
  #body;
  #markdown = null;
  #on;

  constructor(message, on) {
    this.#message = message;
    this.#on = on;
    this.element = document.querySelector("#message").content.cloneNode(true).firstElementChild;
    this.#body = this.element.querySelector(".body");
    this.element.classList.add(message.role);
    this.element.ariaLabel = message.role === "user" ? "You" : "Answer";
    this.#wire();
    if (message.role === "user") this.#body.textContent = message.content;
    else this.restart();
  }

  /** Show an answer from its beginning. */
  restart() {
    this.#body.replaceChildren();
    this.#markdown = new Markdown(this.#body, () => this.#on.shown());
    this.append(this.#message.content);
    this.wait(this.#message.end ? "" : "…");
  }

  append(text) {
    if (text) this.wait("");
    this.#markdown.append(text);
  }

  /** Say what is waited for. */
  wait(text) {
    this.element.querySelector(".wait").textContent = text;
  }

  /** Show how it ended. */
  end() {
    const { role, end, error } = this.#message;
    if (role === "user") return;
    this.#markdown.finish();
    this.wait("");
    this.element.querySelector(".facts").textContent = facts(this.#message);
    this.element.querySelector(".problem").textContent = error ? problem(error) : end ? "" : UNTOLD;
    this.#on.shown();
  }

  #wire() {
    const [copy, edit, again] = [".copy", ".edit", ".again"].map((name) => this.element.querySelector(name));
    copyButton(copy, () => this.#message.content);
    edit.addEventListener("click", () => this.#edit());
    again.addEventListener("click", () => this.#on.again());
    (this.#message.role === "user" ? again : edit).remove();
  }

  #edit() {
    const form = document.querySelector("#editor").content.cloneNode(true).firstElementChild;
    const area = form.querySelector("textarea");
    const close = () => {
      form.replaceWith(this.#body);
      this.element.querySelector(".edit").focus();
    };
    area.value = this.#message.content;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) this.#on.edit(area.value);
    });
    form.querySelector(".cancel").addEventListener("click", close);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it stops no answer
        close();
      } else if (sends(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.#body.replaceWith(form);
    grow(area);
    area.addEventListener("input", () => grow(area));
    area.focus();
  }
}

/** Whether a key means "send": Enter, unless it makes a new line or belongs to an input method. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** Make a text area as high as its text. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function facts({ end, usage, timings }) {
  const told = [];
  if (ENDS[end]) told.push(ENDS[end]);
  if (usage?.completion_tokens) told.push(`${usage.completion_tokens} tokens`);
  if (timings?.tokens_per_s) told.push(`${timings.tokens_per_s.toFixed(1)} tokens/s`);
  if (timings?.ttft_ms) told.push(`first token after ${duration(timings.ttft_ms)}`);
  return told.join(" · ");
}

function problem({ code, message, retryAfterMs }) {
  const wait = retryAfterMs ? ` Try again in ${duration(retryAfterMs)}.` : "";
  return PROBLEMS[code] ?? `${message}${wait}`;
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
