/** The conversations, each under a key of its own in the browser, so that two tabs do not overwrite each other's. */

import { browserStorage } from "./storage.js";

const PREFIX = "wsserver.conversation.";
const TITLE_LENGTH = 60;

export const newConversation = (settings = {}) => ({
  id: Math.random().toString(36).slice(2),
  changed: Date.now(),
  settings: { ...settings },
  messages: [],
});

/** All that are kept, the one that changed last first. */
export function conversations() {
  const keys = Array.from(browserStorage, (_, index) => browserStorage.key(index)).filter((key) => key.startsWith(PREFIX));
  const all = keys.map((key) => read(browserStorage.getItem(key))).filter((conversation) => conversation !== null);
  return all.sort((one, other) => other.changed - one.changed);
}

/** Give one as it is kept, null if it is not. */
export const conversation = (id) => read(browserStorage.getItem(PREFIX + id));

/** Keep one; false if the browser has no room left. */
export function keep(conversation) {
  try {
    browserStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export const remove = (id) => browserStorage.removeItem(PREFIX + id);

/** Tell when another tab has changed one; `id` is whose. */
export function onChangeElsewhere(listener) {
  addEventListener("storage", ({ key }) => key?.startsWith(PREFIX) && listener(key.slice(PREFIX.length)));
}

/** Give its first words. */
export function title({ messages }) {
  const words = messages.find(({ role }) => role === "user")?.content.trim().split("\n")[0] || "New chat";
  return words.length > TITLE_LENGTH ? `${words.slice(0, TITLE_LENGTH)}…` : words;
}

function read(text) {
  try {
    const kept = JSON.parse(text);
    return Array.isArray(kept?.messages) && kept.settings ? kept : null;
  } catch {
    return null; // not this page's
  }
}
