/** The drawer: a conversation's system prompt and sampling, and what belongs to the browser. */

import { browserStorage } from "./storage.js";

const THEME = "wsserver.theme";
const form = document.querySelector("#settings form");
const dialog = document.querySelector("#settings");

/** Show a conversation's settings; `changed(settings)` gets them when the drawer is closed. */
export function openSettings(settings, { hasKey, forgetKey, changed }) {
  for (const { name, control } of controls()) {
    const value = settings[name] ?? "";
    control.value = Array.isArray(value) ? value.join("\n") : value;
  }
  const forget = document.querySelector("#forget-key");
  forget.hidden = !hasKey;
  forget.onclick = () => {
    forgetKey();
    forget.hidden = true;
  };
  dialog.onclose = () => changed(read());
  dialog.showModal();
}

/** Use the colours that were chosen here before, and let others be chosen. */
export function wireTheme() {
  const select = document.querySelector("#theme");
  const use = (theme) => (document.documentElement.style.colorScheme = theme);
  select.value = browserStorage.getItem(THEME) ?? "light dark";
  use(select.value);
  select.addEventListener("change", () => {
    browserStorage.setItem(THEME, select.value);
    use(select.value);
  });
}

/** What is filled in and can be: the form's close button refuses the rest, Escape leaves it out. */
function read() {
  const settings = {};
  for (const { name, control } of controls()) {
    if (!control.value.trim() || !control.validity.valid) continue;
    if (name === "stop") settings.stop = control.value.split("\n").filter(Boolean);
    else settings[name] = control.type === "number" ? control.valueAsNumber : control.value;
  }
  return settings;
}

const controls = () => [...form.elements].filter(({ name }) => name).map((control) => ({ name: control.name, control }));

// A press outside closes it, as Escape does.
dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close());
