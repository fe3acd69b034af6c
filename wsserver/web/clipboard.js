/** Buttons that copy. */

const SHOWN_MS = 1500;

/** Make a button copy what `text()` gives when it is pressed, and say so for a moment. */
export function copyButton(button, text) {
  const before = button.textContent;
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text(), button)) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = before), SHOWN_MS);
  });
}

async function copied(text, button) {
  if (!navigator.clipboard) return copiedBySelection(text, button);
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text, button);
  }
}

// Where a page came over plain HTTP from another machine, browsers have no clipboard for it.
function copiedBySelection(text, button) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "offscreen";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  button.focus();
  return done;
}
