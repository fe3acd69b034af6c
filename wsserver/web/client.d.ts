/** Types of client.js. The fields of requests and frames are explained in protocol.md. */

export type ErrorCode =
  | "bad_json"
  | "bad_message"
  | "unknown_type"
  | "duplicate_id"
  | "not_active"
  | "unauthenticated"
  | "forbidden"
  | "rate_limited"
  | "model_not_found"
  | "load_failed"
  | "cancelled"
  | "context_length_exceeded"
  | "overloaded"
  | "unsupported"
  | "shutting_down"
  | "resume_expired"
  | "internal"
  /** The first connection could not be made. */
  | "unreachable"
  /** The connection was lost with an answer that was not to be resumed. */
  | "connection_lost"
  /** The answer goes on where it was taken up, on another connection. */
  | "detached"
  /** The connection has ended for good; the message says why. */
  | "closed";

export class ServerError extends Error {
  name: "ServerError";
  code: ErrorCode;
  /** After how many milliseconds trying again makes sense, where the server says so. */
  retryAfterMs?: number;
}

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface Sampling {
  max_tokens?: number;
  min_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  logit_bias?: Record<string, number>;
  seed?: number;
  stop?: string | string[];
  stop_token_ids?: number[];
  logprobs?: number;
  ignore_eos?: boolean;
  user?: string;
}

export type GenerateRequest = Sampling & {
  stream?: boolean;
  /** Whether the answer outlives the connection it was asked on; true if left out. */
  resumable?: boolean;
} & ({ messages: Message[]; prompt?: undefined } | { prompt: string; messages?: undefined });

export interface InitRequest {
  model?: string;
  quantization?: "none" | "int8" | "nf4" | "fp4";
  dtype?: "auto" | "float32" | "float16" | "bfloat16";
  device?: string;
}

export interface Alternative {
  token_id: number;
  text?: string;
  logprob: number;
}

export interface TokenLogprob extends Alternative {
  top?: Alternative[];
}

export interface Done {
  type: "done";
  id: string;
  finish_reason: "stop" | "length" | "cancelled" | "timeout" | "shutdown" | "error";
  /** Left out, with the timings, of an answer that was stopped while there was no connection. */
  usage?: { prompt_tokens: number; completion_tokens: number; cached_tokens: number };
  timings?: {
    total_ms: number;
    queued_ms?: number;
    prefill_ms?: number;
    ttft_ms?: number;
    tokens_per_s?: number;
    cancel_ms?: number;
  };
  text?: string;
  logprobs?: TokenLogprob[];
  error?: { code: ErrorCode; message: string; retry_after_ms?: number };
}

export interface Refused {
  type: "error";
  id?: string;
  code: ErrorCode;
  message: string;
  retry_after_ms?: number;
}

export interface Ready {
  type: "ready";
  id: string;
  protocol: number;
  server: string;
  session: string;
  model: { id: string; context_length: number; dtype: string; quantization: string; device: string };
  limits: { max_message_bytes: number; max_active: number; max_prompt_tokens?: number; max_tokens?: number };
}

export type LoadFrame = { type: "loading"; id: string; model: string; stage: string; progress: number } | Ready | Refused;

export type AnswerFrame =
  | { type: "queued"; id: string; position: number }
  | { type: "started"; id: string; model: string; prompt_tokens: number; cached_tokens: number; resume_token?: string }
  | { type: "prefill"; id: string; done: number; total: number }
  | { type: "resumed"; id: string; seq: number }
  | { type: "token"; id: string; seq: number; n: number; text: string; logprobs?: TokenLogprob[] }
  | { type: "detached"; id: string }
  | Done
  | Refused;

export interface Status {
  type: "status";
  server: { version: string; uptime_s: number; draining: boolean };
  models: { id: string; state: "loading" | "ready" | "restarting" | "failed"; [detail: string]: unknown }[];
  available: string[];
  connection: { session: string; active: string[] };
}

export interface ConnectOptions {
  /** The key, where the server asks for one. It is shown in an init: a wrong one ends the connection as "unauthenticated". */
  token?: string;
  /** Told of every change: `retryInMs` and `reason` come with "connecting", `error` with "closed", which is final. */
  onState?: (
    state: "open" | "connecting" | "closed",
    detail: { retryInMs?: number; reason?: string; error?: Error },
  ) => void;
  /** Milliseconds without a word from the server after which, if something is waited for, the connection is made anew; 20,000. */
  patience?: number;
}

export interface Options<Frame> {
  /** Stops it; an answer then ends as "cancelled", a load throws a ServerError of that code. */
  signal?: AbortSignal;
  /** Told of every frame that comes for it: places in line, progress, log probabilities. */
  onFrame?: (frame: Frame) => void;
}

/** What it takes to go on with an answer on another connection. */
export interface Begun {
  id: string;
  resumeToken: string | null;
  /** The next token that is expected; 0, the whole answer, if left out. */
  nextSeq?: number;
}

/** An answer: iterate over it once. Errors of the server, and of the connection, are thrown by the iteration. */
export interface Answer extends AsyncIterable<string>, Begun {
  /** What ended it; null before that, and where the connection did. */
  readonly done: Done | null;
  /** Iterates, and gives the whole text. */
  text(): Promise<string>;
  /** Stops it; resolves once it has ended. */
  cancel(): Promise<void>;
}

export interface Chat {
  readonly state: "open" | "connecting" | "closed";
  readonly error: Error | null;
  generate(request: GenerateRequest, options?: Options<AnswerFrame>): Answer;
  resume(begun: Begun, options?: Options<AnswerFrame>): Answer;
  init(request?: InitRequest, options?: Options<LoadFrame>): Promise<Ready>;
  status(): Promise<Status>;
  reconnect(): void;
  close(): void;
}

export function connect(url: string, options?: ConnectOptions): Promise<Chat>;
