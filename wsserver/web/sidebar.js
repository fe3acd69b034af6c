/** The list of conversations. Knows no messages. */

import { conversations, title } from "./conversations.js";

const list = document.querySelector("#conversations");
const sidebar = document.querySelector("#sidebar");
const shower = document.querySelector("#show-sidebar");
const narrow = matchMedia("(max-width: 720px)");

/** Wire the list: `on` has `open(id)`, `remove(id)` and `create()`. */
export function wireSidebar(on) {
  list.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    const id = button.closest("li").dataset.id;
    if (button.classList.contains("remove")) on.remove(id);
    else on.open(id);
    if (!button.classList.contains("remove")) hide();
  });
  document.querySelector("#new-chat").addEventListener("click", () => (on.create(), hide()));
  document.querySelector("#hide-sidebar").addEventListener("click", hide);
  shower.addEventListener("click", () => setOpen(true));
  narrow.addEventListener("change", hide);
  hide();
}

/** Show what there is; `shown` is the id of the one that is open, `busy(id)` whether one is being answered. */
export function listConversations(shown, busy) {
  list.replaceChildren(...conversations().map((conversation) => item(conversation, shown, busy)));
}

const hide = () => setOpen(false);

// On a narrow screen it lies over the messages, and while it is away nobody can get into it by the keyboard either.
function setOpen(open) {
  sidebar.classList.toggle("open", open);
  sidebar.inert = narrow.matches && !open;
  shower.setAttribute("aria-expanded", open);
  if (open) document.querySelector("#hide-sidebar").focus();
}

function item(conversation, shown, busy) {
  const entry = document.createElement("li");
  const [open, remove] = [document.createElement("button"), document.createElement("button")];
  entry.dataset.id = conversation.id;
  entry.classList.toggle("busy", busy(conversation.id));
  open.textContent = title(conversation);
  if (conversation.id === shown) open.setAttribute("aria-current", "true");
  remove.className = "quiet remove";
  remove.textContent = "✕";
  remove.ariaLabel = `Delete: ${title(conversation)}`;
  entry.append(open, remove);
  return entry;
}
