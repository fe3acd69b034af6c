"""`--request-timeout`: a request that takes too long ends with "timeout", wherever it is by then."""

from tests.conftest import eventually
from tests.scripted import in_engine, put, scripted


async def test_while_its_model_loads() -> None:
    async with scripted(request_timeout=0.2) as (server, _), server.client() as client:
        loading = put(server.models, "test/loading")
        loading.load_gate.shut()
        await client.send(type="init", id="load", model="test/loading")
        done = await client.generate(id="g", prompt="hello")
        assert done["finish_reason"] == "timeout"
        assert done["timings"]["total_ms"] >= 200
        loading.open()
        # The load itself goes on for the init.
        await client.until("ready")
        assert not loading.steps


async def test_while_it_stands_in_line() -> None:
    async with scripted(max_active=1) as (server, model), server.client() as client:
        await client.send(type="generate", id="running", prompt="x" * 100, ignore_eos=True)
        await client.until("started")
        server.server.state.request_timeout = 0.3
        await client.send(type="generate", id="waiting", prompt="hello")
        await in_engine(server, 2)
        await eventually(lambda: bool(model.step_gate.let()) or sum(e["queued"] for e in server.models.status()) == 0)
        assert (await client.done("waiting"))["finish_reason"] == "timeout"
        assert not model.steps_of("waiting")
        await client.send(type="cancel", id="running")
        await client.settle()
        model.open()
        assert (await client.done("running"))["finish_reason"] == "cancelled"


async def test_in_the_middle_of_an_answer_what_came_so_far_stays() -> None:
    async with scripted(request_timeout=0.5) as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="abc", ignore_eos=True)
        await eventually(lambda: bool(model.step_gate.let()) or model.frees("g") == 1)
        done = await client.done("g")
        assert done["finish_reason"] == "timeout"
        assert "error" not in done
        assert ("abc" * 10_000).startswith(client.checker.texts["g"]) or done["usage"]["completion_tokens"] > 20_000
        assert client.checker.texts["g"].startswith("abc")


async def test_a_request_that_comes_to_its_end_in_time_is_left_alone() -> None:
    async with scripted(request_timeout=30.0) as (server, model), server.client() as client:
        model.open()
        assert (await client.generate(prompt="hello"))["finish_reason"] == "stop"
