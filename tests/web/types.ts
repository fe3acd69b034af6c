// What a caller of client.js writes, and what its types must refuse: each line under @ts-expect-error is an error.
import { connect, ServerError, type Answer, type Chat, type Done, type Ready } from "./client.js";

const chat: Chat = await connect("ws://127.0.0.1:41443/ws", {
  token: "sk-1",
  onState: (state, { retryInMs }) => state === "connecting" && console.log(retryInMs?.toFixed()),
});
const ready: Ready = await chat.init(
  { model: "a/b", quantization: "nf4" },
  { onFrame: (frame) => frame.type === "loading" && frame.progress.toFixed() },
);
const { signal } = new AbortController();
const answer: Answer = chat.generate(
  { messages: [{ role: "user", content: ready.model.id }], temperature: 0, stop: ["x"] },
  { signal, onFrame: (frame) => frame.type === "queued" && frame.position.toFixed() },
);
try {
  for await (const piece of answer) piece.trim();
} catch (error) {
  if (error instanceof ServerError && error.code === "overloaded") error.retryAfterMs?.toFixed();
}
const done: Done | null = answer.done;
console.log(done?.finish_reason, done?.usage?.completion_tokens, done?.timings?.tokens_per_s);
const whole: string = await chat.resume({ id: answer.id, resumeToken: answer.resumeToken }).text();
await chat.generate({ prompt: whole }).cancel();
(await chat.status()).available.map((id) => id.length);

// @ts-expect-error both
chat.generate({ prompt: "a", messages: [] });
// @ts-expect-error neither
chat.generate({ temperature: 1 });
// @ts-expect-error no such role
chat.generate({ messages: [{ role: "tool", content: "" }] });
// @ts-expect-error no such field
chat.generate({ prompt: "a", temprature: 1 });
// @ts-expect-error no such code
if (new ServerError("x").code === "no_such_code") chat.close();
