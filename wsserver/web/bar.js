/** The line above the messages: the models, how far a load is, and how the connection stands. */

const [select, load, stage, connection, reconnect] = ["model", "load", "load-stage", "connection", "reconnect"].map((id) =>
  document.querySelector(`#${id}`),
);

/** Wire the line to a session; `failed(error)` is told what went wrong. */
export function wireBar(session, failed) {
  session.addEventListener("state", () => showState(session));
  session.addEventListener("models", () => showModels(session));
  session.addEventListener("loading", ({ detail }) => showLoading(detail));
  session.addEventListener("problem", ({ detail }) => failed(detail));
  select.addEventListener("change", () => session.choose(select.value).catch(failed));
  reconnect.addEventListener("click", () => session.reconnect());
  addEventListener("online", () => session.reconnect());
  document.addEventListener("visibilitychange", () => {
    // What others have loaded meanwhile; if that cannot be asked now, it will be when there is a connection.
    if (!document.hidden && session.state === "open") session.refresh().catch(() => {});
  });
}

function showState({ state, detail }) {
  connection.dataset.state = state;
  reconnect.hidden = !(detail.retryInMs || state === "closed");
  if (state === "open") connection.textContent = "Connected";
  else if (state === "closed") connection.textContent = detail.error.message;
  else if (!detail.retryInMs) connection.textContent = "Connecting";
  else connection.textContent = `Reconnecting in ${Math.max(1, Math.round(detail.retryInMs / 1000))} s`;
  connection.title = detail.reason ?? "";
}

function showModels({ available, loaded, model }) {
  const options = available.map((id) => new Option(loaded.includes(id) ? id : `${id} – not loaded`, id));
  select.replaceChildren(...options);
  select.value = model?.id ?? "";
  select.disabled = !available.length;
}

function showLoading(frame) {
  load.hidden = frame === null;
  stage.textContent = frame === null ? "" : `Loading ${frame.stage} ${Math.round(frame.progress * 100)} %`;
  if (frame !== null) load.value = frame.progress;
}
