from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.protocol import Done, Timings, Token, TokenLogprob, Usage
from wsserver.transcript import Transcript

pieces = st.lists(st.tuples(st.integers(1, 4), st.text(min_size=1, max_size=9)), max_size=12)


def done(reason: str = "stop") -> Done:
    usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0)
    return Done(id="g", finish_reason=reason, usage=usage, timings=Timings(total_ms=1.0))  # type: ignore[arg-type]


def scored(n: int) -> list[TokenLogprob]:
    return [TokenLogprob(token_id=i, logprob=0.0) for i in range(n)]


def written(pieces: Iterable[tuple[int, str]], streams: bool = True, logprobs: bool = False) -> Transcript:
    transcript = Transcript("g", streams)
    for n, text in pieces:
        frame = Token(id="g", seq=transcript.tokens, n=n, text=text, logprobs=scored(n) if logprobs else None)
        transcript.add(frame)
    return transcript


def read(transcript: Transcript, seq: int, max_bytes: int) -> tuple[list[Token], Done | None]:
    frames = []
    while frame := transcript.after(seq, max_bytes):
        if isinstance(frame, Done):
            return frames, frame
        assert frame.seq == seq
        frames.append(frame)
        seq += frame.n
    return frames, None


@given(pieces, st.integers(1, 40), st.booleans(), st.booleans())
def test_from_every_border_the_rest_is_read_whole_and_in_order(
    pieces: list[tuple[int, str]], max_bytes: int, ended: bool, logprobs: bool
) -> None:
    transcript = written(pieces, logprobs=logprobs)
    if ended:
        assert transcript.end(done()) == done()
    borders = [sum(n for n, _ in pieces[:i]) for i in range(len(pieces) + 1)]
    for place, seq in enumerate(borders):
        assert transcript.reaches(seq)
        frames, end = read(transcript, seq, max_bytes)
        assert "".join(frame.text for frame in frames) == "".join(text for _, text in pieces[place:])
        assert sum(frame.n for frame in frames) == borders[-1] - seq
        assert all(frame.logprobs is None or len(frame.logprobs) == frame.n for frame in frames)
        assert all((frame.logprobs is not None) == logprobs for frame in frames)
        assert end == (done() if ended else None)
    assert [seq for seq in range(borders[-1] + 3) if transcript.reaches(seq)] == borders


def test_pieces_come_as_one_frame_up_to_the_bytes_that_are_asked_for() -> None:
    transcript = written([(1, "abcd")] * 6)
    assert [frame.text for frame in read(transcript, 0, 10)[0]] == ["abcd" * 3] * 2
    assert [frame.text for frame in read(transcript, 0, 1)[0]] == ["abcd"] * 6
    assert [frame.text for frame in read(transcript, 2, 10_000)[0]] == ["abcd" * 4]


def test_an_answer_that_is_not_streamed_has_nothing_but_its_end_which_tells_it_whole() -> None:
    transcript = written([(2, "Hel"), (1, "lo")], streams=False, logprobs=True)
    assert transcript.after(0, 100) is None
    assert [seq for seq in range(5) if transcript.reaches(seq)] == [0]
    end = transcript.end(done())
    assert (end.text, len(end.logprobs or ())) == ("Hello", 3)
    assert transcript.after(0, 100) == end


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_of_nothing_has_its_end(streams: bool) -> None:
    transcript = written([], streams)
    end = transcript.end(done("length"))
    assert end.text == (None if streams else "")
    assert transcript.after(0, 100) == end


def test_dropped_tokens_are_not_read_from_anywhere_they_were_and_take_no_room() -> None:
    transcript = written([(2, "Hel"), (1, "lo")])
    empty, full = written([]).size, transcript.size
    transcript.drop_tokens()
    assert transcript.size == empty < full
    assert all(transcript.reaches(seq) for seq in (0, 2, 3))
    assert not transcript.reaches(4)
    assert transcript.after(0, 100) is None
    transcript.end(done("cancelled"))
    assert [transcript.after(seq, 100) for seq in (0, 2, 3)] == [done("cancelled")] * 3


def test_it_grows_by_what_it_is_told() -> None:
    one, two = written([(1, "a" * 100)]), written([(1, "a" * 1000)])
    assert two.size - one.size == 900
    assert written([(1, "a")], logprobs=True).size > written([(1, "a")]).size
