"""llama.cpp through llama-cpp-python, one request at a time. Runs as a child process.

A yardstick of another make: the same weights in the same precision, written as a GGUF file, and llama.cpp's own tokenizer.
"""

from collections.abc import Callable
from itertools import islice

from llama_cpp import Llama

from bench.gguf_model import cached
from bench.sides.in_process import Job, serve
from bench.sides.side import Setting

CONTEXT = 4096


def load(setting: Setting) -> Callable[[Job], None]:
    """Load the model; give what runs one job."""
    path = cached(setting.folder, setting.dtype)
    threads = setting.threads
    model = Llama(str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(job: Job) -> None:
        prompt = model.tokenize(job.prompt.encode(), add_bos=False)
        # Its generator knows no end token: whoever reads it stops.
        for token in islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), job.max_tokens):
            if model.detokenize([token]):
                job.arrived()
        job.done(len(prompt), job.max_tokens)

    return run


if __name__ == "__main__":
    serve(load)
