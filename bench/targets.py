"""What every row says, and what it is to reach. A row without a target is there to be read beside the others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """One row: what is compared, in which unit the two sides are, and what the value must and should be.

    The value is the ratio of the two sides where there are two, else our own figure. `at_most` says that less is better.
    """

    what: str
    unit: str = ""
    must: float | None = None
    stretch: float | None = None
    at_most: bool = False

    def verdict(self, value: float) -> str:
        """Say which of the two marks a value reaches."""
        reached = [
            name
            for name, mark in (("stretch", self.stretch), ("must", self.must))
            if mark is not None and (value <= mark if self.at_most else value >= mark)
        ]
        return (reached or ["misses"])[0] if self.must is not None else ""


def _less(what: str, unit: str, must: float | None, stretch: float | None = None) -> Target:
    return Target(what, unit, must, stretch, at_most=True)


TARGETS = {
    "one_stream_f32.generate": Target("one stream, float32: model.generate + streamer", "tok/s", 1.0, 1.5),
    "one_stream_f32.llama": Target("one stream, float32, compiled: llama.cpp", "tok/s", 0.40, 0.6),
    "one_stream_f32.llama_eager": Target("one stream, float32: llama.cpp", "tok/s"),
    "one_stream_f32.bandwidth": Target("one stream, float32, compiled: share of the memory bandwidth", "share"),
    "one_stream_bf16.generate": Target("one stream, bfloat16: model.generate + streamer", "tok/s", 1.0, 1.5),
    "one_stream_bf16.llama": Target("one stream, bfloat16, compiled: llama.cpp", "tok/s", 0.55, 0.8),
    "one_stream_bf16.llama_eager": Target("one stream, bfloat16: llama.cpp", "tok/s"),
    "one_stream_bf16.bandwidth": Target("one stream, bfloat16, compiled: share of the memory bandwidth", "share", 0.35, 0.5),
    "clients_16.serve": Target("16 clients: transformers serve", "tok/s", 4.0, 6.0),
    "clients_16.serve_cb": Target("16 clients: transformers serve, continuous", "tok/s", 1.3, 1.8),
    "clients_16.cb": Target("16 clients: continuous batching in process", "tok/s"),
    "clients_16.itl": _less("16 clients, inter-token latency: continuous batching in process", "ms", 0.75, 0.6),
    "clients_16.ttft": _less("16 clients, first token: continuous batching in process", "ms", 1.0, 0.7),
    "clients_16.itl_serve_cb": _less("16 clients, inter-token latency: transformers serve, continuous", "ms", None),
    "clients_16.ttft_serve_cb": _less("16 clients, first token: transformers serve, continuous", "ms", None),
    "poisson.itl": _less("Poisson arrivals, inter-token latency: transformers serve, continuous", "ms", None),
    "poisson.ttft": _less("Poisson arrivals, first token: transformers serve, continuous", "ms", None),
    "overhead.1": _less("engine and transport, one stream: token to token over a bare decode loop", "share", 0.05, 0.02),
    "overhead.16": _less("engine and transport, 16 streams: token to token over a bare decode loop", "share", 0.05, 0.02),
    "cancel": _less("first token after a cancel, over the same without one", "steps", 1.0, 0.1),
    # Beside one stream every token wakes two threads out of a cold cache, which is most of what is measured there.
    "server_cpu.1": _less("server's own CPU per token, one stream", "ms", None),
    "server_cpu.16": _less("server's own CPU per token, 16 streams", "ms", 0.3, 0.1),
    "echo_frames": Target("echo model, tokens per CPU second: a bare websockets send loop", "tok/s", 1.0, 2.0),
    "stalled_reader": _less("p99 token gap beside a stalled reader: beside one that reads", "ms", 1.1, 1.02),
    "hostile_clients": _less("p99 token gap beside hostile clients: in peace", "ms", 1.5, 1.1),
    "mqtt.first_token": _less("first token over MQTT, after the same over a WebSocket", "ms", 20.0),
    "mqtt.gap": _less("p99 token gap of 50 streams beside 50 over MQTT: beside 50 more", "ms", 1.2),
    "idle_memory": _less("resident memory per idle connection", "KiB", 24.0),
    "soak": _less("growth of the resident memory while 200 clients come and go, after a warm-up", "MiB", None),
    "mixed_sampling": Target("16 requests with every sampling parameter: 16 greedy ones", "tok/s", 0.85),
    "long_prompt": _less("worst gap of a stream while a long prompt is prefilled: its median gap", "ms", 5.0),
    "load_beside": _less("worst gap of a stream while another model is loaded: its median gap", "ms", None),
    "quantised.int8": Target("one stream, int8: bfloat16", "tok/s"),
    "quantised.nf4": Target("one stream, nf4: bfloat16", "tok/s"),
    "quantised.fp4": Target("one stream, fp4: bfloat16", "tok/s"),
    "chat": _less("ten-turn chat, tokens prefilled: its final length", "tokens", 1.1),
    "llama_3b.1": Target("Llama-3.2-3B, one stream: share of the floor", "share", 0.75, 0.85),
    "llama_3b.16": Target("Llama-3.2-3B, 16 streams: share of the floor", "share", 0.70, 0.78),
    "llama_3b.64": Target("Llama-3.2-3B, 64 streams: share of the floor", "share", 0.65, 0.75),
    "llama_3b.generate": Target("Llama-3.2-3B, one stream: model.generate, eager", "tok/s", 4.0, 5.0),
    "llama_3b.cb": Target("Llama-3.2-3B, 64 streams: continuous batching as it ships", "tok/s", 5.0, 8.0),
    "llama_3b.cb_best": Target("Llama-3.2-3B, 64 streams: continuous batching, best settings", "tok/s", 1.5, 2.5),
    "llama_3b.loop": Target("Llama-3.2-3B, 64 sockets: bare decode loop", "tok/s", 0.95, 0.98),
    "llama_3b.jitter": _less("Llama-3.2-3B, 64 streams: inter-token latency p99 over p50", "x", 1.25, 1.15),
    "llama_3b.first_token": _less("Llama-3.2-3B, idle: first token over the floor", "ms", 4.0, 2.0),
    "llama_3b.cancel": _less("Llama-3.2-3B: first token after a cancel, over the same without one", "steps", 2.0, 1.0),
    "llama_3b.cancel_ack": _less("Llama-3.2-3B: cancel acknowledged, p99", "ms", 5.0, 2.0),
    "llama_3b.load": Target("Llama-3.2-3B: load from a warm page cache", "GB/s", 12.0),
    "mistral_7b.1": Target("Mistral-7B, one stream: share of the floor", "share", 0.80, 0.87),
    "mistral_7b.16": Target("Mistral-7B, 16 streams: share of the floor", "share", 0.70, 0.78),
    "mistral_7b.64": Target("Mistral-7B, 64 streams: share of the floor", "share", 0.65, 0.75),
    "qwen_0_6b.1": Target("Qwen3-0.6B, one stream: share of the floor", "share", 0.40, 0.55),
    "client.websocket": Target("the bench's WebSocket client on a null server: wsserver at 16 clients", "tok/s", 10.0),
    "client.http": Target("the bench's HTTP client on a null server: wsserver at 16 clients", "tok/s", 10.0),
}
