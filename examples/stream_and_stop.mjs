// Stream an answer, whatever happens to the connection, and stop it. Needs a running server and Node 22.
import { connect } from "../wsserver/web/client.js";

const chat = await connect(process.argv[2] ?? "ws://127.0.0.1:41443/ws");
const answer = chat.generate({ prompt: "Once upon a time", max_tokens: 500 });
let length = 0;
for await (const text of answer) {
  process.stdout.write(text);
  length += text.length;
  if (length > 80) answer.cancel();
}
console.log(`\n[${answer.done.finish_reason} after ${answer.done.usage.completion_tokens} tokens]`);
chat.close();
