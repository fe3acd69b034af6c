from tests.conftest import Client


async def test_an_echo_is_streamed_and_done(client: Client) -> None:
    done = await client.generate(id="g1", prompt="héllo 😀")
    assert done["joined"] == "héllo 😀"
    assert done["finish_reason"] == "stop"
