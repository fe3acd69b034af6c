import json
import math
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from wsserver import protocol
from wsserver.protocol import ClientMessage, Generate, Refusal, ServerMessage, decode, encode

MARK = "zebra7391"  # stands for what a client wrote, and must not come back
HUGE = (2**63, 2**64, 10**300, -(2**63) - 1, -(10**300))

SCHEMA = protocol.schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def refused(message: Any) -> Refusal:
    text = message if isinstance(message, str) else json.dumps(message)
    with pytest.raises(Refusal) as caught:
        decode(text)
    assert MARK not in caught.value.message
    return caught.value


def generate(**fields: Any) -> dict[str, Any]:
    return {"type": "generate", "id": "g1", "prompt": MARK, **fields}


def says(role: Any = "user", content: Any = MARK) -> dict[str, Any]:
    return {"role": role, "content": content}


# What is good.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"type":"status"}', protocol.Status()),
        ('{"type":"status","of":{"your":"choice"}}', protocol.Status()),
        ('{"type":"cancel"}', protocol.Cancel()),
        ('{"type":"cancel","id":"g1"}', protocol.Cancel(id="g1")),
        ('{"type":"init"}', protocol.Init()),
        (
            '{"type":"init","id":"l","model":"a/b","quantization":"nf4","dtype":"auto","device":"cuda:1","token":"t"}',
            protocol.Init(id="l", model="a/b", quantization="nf4", dtype="auto", device="cuda:1", token="t"),
        ),
        ('{"type":"generate","prompt":"x","messages":null,"seed":null}', Generate(prompt="x")),
        ('{"prompt":"x","temperature":0,"type":"generate"}', Generate(prompt="x", temperature=0.0)),
        ('{"type":"generate","prompt":"x","logit_bias":{"50":-100}}', Generate(prompt="x", logit_bias={50: -100.0})),
        ('{"type":"generate","prompt":"x","stop":"END"}', Generate(prompt="x", stop="END")),
        ('{"type":"generate","prompt":"x","stop":["a","b"]}', Generate(prompt="x", stop=["a", "b"])),
        (
            '{"type":"generate","messages":[{"role":"user","content":"","name":"ignored"}]}',
            Generate(messages=[protocol.ChatMessage(role="user", content="")]),
        ),
    ],
)
def test_a_good_message_is_read(text: str, expected: ClientMessage) -> None:
    assert decode(text) == expected


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("max_tokens", 1, 2**31 - 1),
        ("min_tokens", 0, 2**31 - 1),
        ("temperature", 0, 10),
        ("top_p", 1e-9, 1),
        ("top_k", 0, 2**31 - 1),
        ("min_p", 0, 1),
        ("repetition_penalty", 0.1, 10),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("seed", 0, 2**63 - 1),
        ("logprobs", 0, 20),
    ],
)
def test_a_number_is_taken_within_its_range_and_refused_by_name_outside(field: str, least: float, most: float) -> None:
    for number in (least, most):
        assert getattr(decode(json.dumps(generate(**{field: number}))), field) == number
    step = 1 if isinstance(least, int) else 1e-8
    for number in (least - step, most + 1, *HUGE, True, str(least), [least]):
        refusal = refused(generate(**{field: number}))
        assert refusal.code == "bad_message"
        assert refusal.message.startswith(f"$.{field}: ")


@pytest.mark.parametrize("length", [1, 128])
def test_an_id_of_1_to_128_characters_is_taken(length: int) -> None:
    assert decode(json.dumps(generate(id="é" * length))).id == "é" * length


# What is bad.


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        MARK,
        '{"type":"status"',
        '{"type":"status"} ' + MARK,
        '{"type":"status"}{"type":"status"}',
        "{'type': 'status'}",
        "\ufeff" + '{"type":"status"}',
        "[" * 2000 + "]" * 2000,
        '{"type":"generate","prompt":"x","deep":' + '{"a":' * 2000 + "1" + "}" * 2001,
        '{"type":"generate","prompt":"x","temperature":NaN}',
        '{"type":"generate","prompt":"x","temperature":-Infinity}',
        '{"type":"generate","prompt":"x","temperature":1e999}',
        '{"type":"generate","prompt":"\\ud800' + MARK + '"}',
        '{"type":"generate","prompt":"\\udc00"}',
        '{"type":"generate","prompt":"\ud800' + MARK + '"}',
    ],
)
def test_what_is_no_json_is_refused_as_bad_json(text: str) -> None:
    refusal = refused(text)
    assert (refusal.code, refusal.id, refusal.answers_with_done) == ("bad_json", None, False)
    refusal.message.encode()


@pytest.mark.parametrize(
    "message", [[], [MARK], 5, "null", f'"{MARK}"', {}, {"type": 5}, {"type": None}, {"type": [MARK]}, "[" * 999 + "]" * 999]
)
def test_what_has_no_type_is_refused_and_told_the_types(message: Any) -> None:
    refusal = refused(message)
    assert (refusal.code, refusal.answers_with_done) == ("bad_message", False)
    assert refusal.message.startswith("$.type: ")
    assert "init, generate, cancel, resume, status" in refusal.message


@pytest.mark.parametrize("kind", [MARK, "", "Generate", "done", "token", "statusreport", "generate "])
def test_an_unknown_type_is_refused_and_told_the_types(kind: str) -> None:
    refusal = refused({"type": kind, "id": "g1", "prompt": "x"})
    assert (refusal.code, refusal.answers_with_done) == ("unknown_type", False)
    assert "init, generate, cancel, resume, status" in refusal.message


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("$", {"prompt": None}),
        ("$", {"messages": [says()]}),
        ("$.prompt", {"prompt": ""}),
        ("$.prompt", {"prompt": [MARK]}),
        ("$.messages", {"messages": [], "prompt": None}),
        ("$.messages", {"messages": MARK, "prompt": None}),
        ("$.messages", {"messages": {MARK: MARK}, "prompt": None}),
        ("$.messages[0]", {"messages": [MARK], "prompt": None}),
        ("$.messages[0]", {"messages": [{"role": "user"}], "prompt": None}),
        ("$.messages[0]", {"messages": [{"content": MARK}], "prompt": None}),
        ("$.messages[1].role", {"messages": [says(), says(role=MARK)], "prompt": None}),
        ("$.messages[0].role", {"messages": [says(role=5)], "prompt": None}),
        ("$.messages[0].content", {"messages": [says(content=None)], "prompt": None}),
        ("$.messages[0].content", {"messages": [says(content=[{"text": MARK}])], "prompt": None}),
        ("$.stream", {"stream": 1}),
        ("$.stream", {"stream": MARK}),
        ("$.temperature", {"temperature": MARK}),
        ("$.max_tokens", {"max_tokens": 1.5}),
        ("$.seed", {"seed": 1e30}),
        ("$.logit_bias", {"logit_bias": [MARK]}),
        ("$.logit_bias", {"logit_bias": {MARK: 1}}),
        ("$.logit_bias", {"logit_bias": {"-1": 1}}),
        ("$.logit_bias", {"logit_bias": {"1.5": 1}}),
        ("$.logit_bias", {"logit_bias": {str(2**64): 1}}),
        ("$.logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
        ("$.logit_bias[...]", {"logit_bias": {"5": MARK}}),
        ("$.logit_bias[...]", {"logit_bias": {"5": 101}}),
        ("$.stop", {"stop": ""}),
        ("$.stop", {"stop": 5}),
        ("$.stop", {"stop": MARK * 30}),
        ("$.stop", {"stop": [MARK] * 17}),
        ("$.stop[1]", {"stop": [MARK, ""]}),
        ("$.stop[0]", {"stop": [5]}),
        ("$.stop_token_ids", {"stop_token_ids": [1] * 65}),
        ("$.stop_token_ids[0]", {"stop_token_ids": [-1]}),
        ("$.stop_token_ids[1]", {"stop_token_ids": [1, 2**31]}),
        ("$.ignore_eos", {"ignore_eos": MARK}),
    ],
)
def test_a_bad_field_of_a_generate_is_refused_by_name_with_its_id(field: str, fields: dict[str, Any]) -> None:
    refusal = refused(generate(**fields))
    assert (refusal.code, refusal.id, refusal.answers_with_done) == ("bad_message", "g1", True)
    assert re.fullmatch(rf"{re.escape(field)}: [a-z].+", refusal.message), refusal.message


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("$.model", {"type": "init", "model": 5}),
        ("$.model", {"type": "init", "model": ""}),
        ("$.model", {"type": "init", "model": MARK * 40}),
        ("$.quantization", {"type": "init", "quantization": MARK}),
        ("$.dtype", {"type": "init", "dtype": MARK}),
        ("$.device", {"type": "init", "device": f"cpu{MARK}"}),
        ("$.device", {"type": "init", "device": "cuda:123"}),
        ("$.device", {"type": "init", "device": "cpu\n"}),
        ("$.device", {"type": "init", "device": 0}),
        ("$.token", {"type": "init", "token": [MARK]}),
        ("$.id", {"type": "cancel", "id": [MARK]}),
        ("$.id", {"type": "cancel", "id": ""}),
    ],
)
def test_a_bad_field_of_another_message_is_refused_by_name_with_an_error(field: str, message: dict[str, Any]) -> None:
    refusal = refused(message)
    assert (refusal.code, refusal.id, refusal.answers_with_done) == ("bad_message", None, False)
    assert refusal.message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "path", "value"),
    [
        ("role", "$.messages[0].role", {"type": "generate", "messages": [says(role="tool")]}),
        ("dtype", "$.dtype", {"type": "init", "dtype": "float8"}),
        ("quantization", "$.quantization", {"type": "init", "quantization": "int3"}),
        ("device", "$.device", {"type": "init", "device": "tpu"}),
    ],
)
def test_a_value_that_is_none_of_a_list_is_answered_with_the_list(field: str, path: str, value: Any) -> None:
    assert refused(value).message == f"{path}: send one of {', '.join(protocol.CHOICES[field])}"


@pytest.mark.parametrize(
    ("message", "id", "answers_with_done"),
    [
        (generate(prompt=5), "g1", True),
        (generate(prompt=5, id=None), None, True),
        ({"type": "generate"}, None, True),
        (generate(id=""), None, False),
        (generate(id=MARK * 20), None, False),
        (generate(id=5), None, False),
        (generate(id=[MARK], prompt=5), None, False),
        ({"type": "init", "id": "l1", "dtype": 5}, "l1", False),
        ({"type": "init", "id": 5, "dtype": 5}, None, False),
    ],
)
def test_only_a_bad_generate_whose_id_is_good_or_left_out_is_answered_with_a_done(
    message: dict[str, Any], id: str | None, answers_with_done: bool
) -> None:
    refusal = refused(message)
    assert (refusal.id, refusal.answers_with_done) == (id, answers_with_done)


def test_a_client_cannot_put_words_into_a_refusal_through_its_id() -> None:
    assert refused(generate(id=f"Expected `int` - at `$.{MARK}`", prompt=5)).message.startswith("$.prompt: ")


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, type in protocol.CLIENT_TYPES.items() for field in type.__struct_fields__]
)
def test_no_refusal_repeats_what_a_client_wrote(kind: str, field: str) -> None:
    for wrong in ({MARK: [MARK]}, [{MARK: MARK}]):
        assert refused({"type": kind, **({"prompt": MARK} if field != "prompt" else {}), field: wrong}).code == "bad_message"


# What is said in return.


def strategy(hint: Any, meta: msgspec.Meta | None = None) -> st.SearchStrategy[Any]:
    """Give values of a message's field, from its type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return strategy(args[0], args[1])
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, UnionType):
        return st.one_of([strategy(arg) for arg in args])
    sizes = {"min_size": (meta and meta.min_length) or 0, "max_size": min((meta and meta.max_length) or 4, 4)}
    if origin is list:
        return st.lists(strategy(args[0]), **sizes)
    if origin is dict:
        return st.dictionaries(strategy(args[0]), strategy(args[1]), **sizes)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return struct(hint)
    bounds = {"min_value": _either(meta, "ge", "gt", -(2**31)), "max_value": _either(meta, "le", "lt", 2**31)}
    text = st.from_regex(meta.pattern, fullmatch=True) if meta and meta.pattern else st.text(**sizes)
    return {
        NoneType: st.none(),
        bool: st.booleans(),
        int: st.integers(**bounds),
        float: st.floats(**bounds, exclude_min=bool(meta and meta.gt is not None)),
        str: text,
        Any: st.one_of(st.none(), st.integers(-(2**53), 2**53), st.text()),
    }[hint]


def _either(meta: msgspec.Meta | None, inclusive: str, exclusive: str, otherwise: int) -> Any:
    bounds = [getattr(meta, name) for name in (inclusive, exclusive) if getattr(meta, name, None) is not None]
    return bounds[0] if bounds else otherwise


def struct(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind, include_extras=True)
    fields = {name: strategy(hints[name]) for name in kind.__struct_fields__}
    if kind is not Generate:
        return st.builds(kind, **fields)
    prompts = {"messages": fields.pop("messages").filter(bool), "prompt": fields.pop("prompt").filter(bool)}
    rest = st.fixed_dictionaries(fields)
    return st.sampled_from(["messages", "prompt"]).flatmap(
        lambda name: st.builds(lambda prompt, some: kind(**some, **{name: prompt}), prompts[name], rest)
    )


@pytest.mark.parametrize("kind", get_args(ServerMessage))
@QUICK
@given(data=st.data())
def test_any_server_message_is_one_json_object_of_its_type_that_fits_the_schema(kind: type, data: st.DataObject) -> None:
    message = data.draw(struct(kind))
    sent = json.loads(encode(message).decode())
    assert isinstance(sent, dict)
    assert sent["type"] == ("status" if kind is protocol.StatusReport else kind.__name__.lower())
    VALIDATOR.validate(sent)
    assert msgspec.convert(sent, kind) == message


@pytest.mark.parametrize("kind", get_args(ClientMessage))
@QUICK
@given(data=st.data())
def test_any_valid_client_message_fits_the_schema_and_is_read_as_it_was_meant(kind: type, data: st.DataObject) -> None:
    message = data.draw(struct(kind))
    sent = json.loads(json.dumps(msgspec.to_builtins(message, str_keys=True)))
    VALIDATOR.validate(sent)
    assert decode(json.dumps(sent)) == message


def test_what_a_server_message_leaves_out_is_not_sent_as_null() -> None:
    usage = protocol.Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=0)
    done = protocol.Done(id="g1", finish_reason="stop", usage=usage, timings=protocol.Timings(total_ms=1.5))
    assert json.loads(encode(done)) == {
        "type": "done",
        "id": "g1",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0},
        "timings": {"total_ms": 1.5},
    }


def test_the_schema_is_a_valid_one_and_knows_every_message() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    mapped = [set(side["discriminator"]["mapping"]) for side in SCHEMA["anyOf"]]
    assert mapped == [
        {"init", "generate", "cancel", "resume", "status"},
        {
            *("loading", "ready", "queued", "started", "resumed", "prefill", "token", "done", "detached"),
            *("error", "status", "goaway"),
        },
    ]


@pytest.mark.parametrize(
    "message",
    [{"type": MARK}, {}, generate(temperature=11), generate(id=""), {"type": "done", "id": "g1"}, {"type": "goaway"}],
)
def test_the_schema_turns_down_what_is_no_message(message: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(message)


# Whatever comes.


def decoded_or_refused(text: str) -> ClientMessage | Refusal:
    try:
        return decode(text)
    except Refusal as refusal:
        encode(protocol.Error(code=refusal.code, message=refusal.message, id=refusal.id))
        return refusal


@QUICK
@given(st.text(st.characters()))
def test_any_text_is_read_or_refused(text: str) -> None:
    decoded_or_refused(text)


@QUICK
@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    decoded_or_refused(json.dumps(value))


@QUICK
@given(st.sampled_from(list(protocol.CLIENT_TYPES)), st.dictionaries(st.sampled_from(Generate.__struct_fields__), JSON))
def test_any_message_with_any_fields_is_read_or_refused_by_name(kind: str, fields: dict[str, Any]) -> None:
    assume(all(not isinstance(v, float) or math.isfinite(v) for v in fields.values()))
    outcome = decoded_or_refused(json.dumps({**fields, "type": kind}))
    if isinstance(outcome, Refusal) and outcome.code != "bad_json":
        assert outcome.message.startswith("$")
