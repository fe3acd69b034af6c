/** The chat page: which conversation is shown, what is being answered, and what the buttons do. */

import { wireBar } from "./bar.js";
import * as kept from "./conversations.js";
import { grow, MessageView, sends } from "./messages.js";
import { Session } from "./session.js";
import { openSettings, wireTheme } from "./settings.js";
import { listConversations, wireSidebar } from "./sidebar.js";
import { isForgetful, tabStorage } from "./storage.js";
import { Turn, unfinished } from "./turn.js";

const SHOWN = "wsserver.shown"; // in the tab: the conversation that this tab shows
const NEAR_END = 48;

const [scroller, log, welcome, composer, question, send, stop, toEnd] = [
  "scroller",
  "log",
  "welcome",
  "composer",
  "question",
  "send",
  "stop",
  "to-end",
].map((id) => document.querySelector(`#${id}`));

const session = new Session(new URL("ws", location.href).href.replace(/^http/, "ws"), askForKey);
const turns = new Map(); // what is being answered, by the conversation's id
let shown = kept.newConversation();
let views = [];
let unshow = new AbortController();
let following = true; // the end of the conversation is in sight, and stays so

// What is shown.

function show(conversation) {
  unshow.abort();
  unshow = new AbortController();
  shown = conversation;
  tabStorage.setItem(SHOWN, shown.id);
  views = [];
  log.replaceChildren();
  for (const message of shown.messages) addView(message);
  const turn = turns.get(shown.id);
  if (turn) attach(turn, views.at(-1));
  following = true;
  update();
  follow();
}

function addView(message) {
  const view = new MessageView(message, {
    shown: follow,
    edit: (text) => ask(text, shown.messages.indexOf(message)),
    again: () => answer(shown.messages.indexOf(message)),
  });
  views.push(view);
  log.append(view.element);
  const running = turns.get(shown.id);
  if (running?.reply !== message) view.end();
  return view;
}

/** Let a view show what comes for its answer, until another conversation is shown. */
function attach(turn, view) {
  const listen = (name, listener) => turn.addEventListener(name, listener, { signal: unshow.signal });
  view.wait(turn.wait || (turn.reply.content ? "" : "…"));
  listen("text", ({ detail }) => view.append(detail));
  listen("wait", ({ detail }) => view.wait(detail));
  listen("restart", () => view.restart());
  listen("end", () => view.end());
}

function follow() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

function update() {
  const running = turns.has(shown.id);
  welcome.hidden = shown.messages.length > 0;
  send.hidden = running;
  send.disabled = !session.chat || session.state === "closed";
  stop.hidden = !running;
  log.ariaBusy = running;
  log.classList.toggle("busy", running);
  document.title = `${shown.messages.length ? kept.title(shown) : "Chat"} – wsserver`;
  listConversations(shown.id, (id) => turns.has(id));
}

// What is asked.

/** Ask a question, in the place of an earlier message and all that came after it, or at the end. */
function ask(text, place = shown.messages.length) {
  if (turns.has(shown.id) || send.disabled) return;
  cutOff(place);
  shown.messages.push({ role: "user", content: text });
  addView(shown.messages.at(-1));
  answer();
}

/** Have the last question answered, in the place of an earlier answer and all that came after it, or at the end. */
function answer(place = shown.messages.length) {
  if (turns.has(shown.id) || send.disabled) return;
  cutOff(place);
  const reply = { role: "assistant", content: "" };
  shown.messages.push(reply);
  shown.changed = Date.now();
  if (!kept.keep(shown)) tell(new Error("This browser has no room left to keep conversations; delete some."));
  follow((following = true));
  const turn = begin(new Turn(shown, reply));
  attach(turn, addView(reply));
  update();
  turn.ask(session);
}

function cutOff(place) {
  shown.messages.splice(place);
  views.splice(place).forEach(({ element }) => element.remove());
}

function begin(turn) {
  turns.set(turn.conversation.id, turn);
  turn.addEventListener("end", () => {
    turns.delete(turn.conversation.id);
    update();
  });
  return turn;
}

/** Go on with what this tab was in the middle of when it was loaded anew. */
function takeUp() {
  for (const [id, begun] of Object.entries(unfinished())) {
    const conversation = id === shown.id ? shown : kept.conversation(id);
    const reply = conversation?.messages.at(-1);
    if (reply?.role !== "assistant" || reply.end) continue;
    const turn = begin(new Turn(conversation, reply));
    session.addEventListener("ready", () => turn.resume(session, begun), { once: true });
  }
}

// What the server or the browser says.

function tell(error) {
  const problem = document.querySelector("#notice");
  problem.querySelector("span").textContent = error.message;
  problem.hidden = false;
}

function askForKey(problem) {
  const dialog = document.querySelector("#key-dialog");
  const field = dialog.querySelector("#key");
  document.querySelector("#key-problem").textContent = problem;
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault(); // without a key there is nothing to see
    dialog.onclose = () => resolve(field.value.trim());
  });
}

// What the buttons do.

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value;
  if (!text.trim() || send.disabled || turns.has(shown.id)) return;
  question.value = "";
  grow(question);
  ask(text);
});
question.addEventListener("input", () => grow(question));
question.addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  composer.requestSubmit();
});
stop.addEventListener("click", () => (turns.get(shown.id)?.stop(), question.focus()));
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape" && !document.querySelector("dialog[open]")) turns.get(shown.id)?.stop();
});
document.querySelector("#suggestions").addEventListener("click", ({ target }) => {
  if (target.matches("button")) ask(target.textContent);
});
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
  toEnd.hidden = following;
});
toEnd.addEventListener("click", () => follow((following = true)));
document.querySelector("#notice button").addEventListener("click", () => (document.querySelector("#notice").hidden = true));
document.querySelector("#show-settings").addEventListener("click", () =>
  openSettings(shown.settings, {
    hasKey: session.hasKey,
    forgetKey: () => session.forgetKey(),
    changed(settings) {
      shown.settings = settings;
      if (shown.messages.length) kept.keep(shown);
    },
  }),
);
wireSidebar({
  open: (id) => show(turns.get(id)?.conversation ?? kept.conversation(id) ?? kept.newConversation()),
  create: () => (show(kept.newConversation(shown.settings)), question.focus()),
  remove(id) {
    if (!confirm("Delete this conversation?")) return;
    turns.get(id)?.discard();
    kept.remove(id);
    if (id === shown.id) show(kept.newConversation(shown.settings));
    else update();
  },
});
kept.onChangeElsewhere((id) => {
  const changed = kept.conversation(id);
  if (changed && id === shown.id && !turns.has(id)) show(changed);
  else update();
});
session.addEventListener("state", update);

wireTheme();
wireBar(session, tell);
if (isForgetful) tell(new Error("This browser lets the page keep nothing; its conversations are gone when it is closed."));
shown = kept.conversation(tabStorage.getItem(SHOWN)) ?? shown;
takeUp();
show(shown);
session.start();
