"""Chat templates: the text that transformers renders, and nothing that a template could abuse."""

import copy
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from olmo3_mlx import TemplateError, Tokenizer
from olmo3_mlx.text.chat_template import ChatTemplate

Messages = list[dict[str, Any]]

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & 'later' in a \"city\" > village: 東京, São Paulo 😀",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "b": {"type": "integer"}, "a": {"type": "boolean"}},
            "required": ["city"],
        },
    },
}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"z": 1, "a": None}}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


USER: Messages = [{"role": "user", "content": "Weather in Paris?"}]
SYSTEM: Messages = [{"role": "system", "content": "Be brief."}, *USER]
ROUND_TRIP: Messages = [
    *USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            call("get_weather", {"city": 'Pa<r>is & "Orly" 😀', "b": 2, "a": True}),
            call("add", {}),
        ],
    },
    {"role": "tool", "content": '{"sky": "clear"}'},
]
TWO_TURNS: Messages = [
    *USER,
    {"role": "assistant", "content": "Clear."},
    {"role": "user", "content": "And tomorrow?"},
]
UNICODE: Messages = [
    {"role": "user", "content": "<b>1 & 2 > 'x' \"y\"</b>\n漢字 😀\u2028 {{ x }} <|im_end|>"}
]

CONVERSATIONS: dict[str, tuple[Messages, list[dict[str, Any]] | None, bool]] = {
    "user": (USER, None, True),
    "system and user": (SYSTEM, None, True),
    "tools": (USER, [WEATHER, ADD], True),
    "no tools": (USER, [], True),
    "system and tools": (SYSTEM, [WEATHER], True),
    "tool round trip": (ROUND_TRIP, [WEATHER, ADD], True),
    "two turns": (TWO_TURNS, None, True),
    "ends with the assistant": ([*TWO_TURNS, {"role": "assistant", "content": "Rain."}], None, False),
    "ends with a tool call": (ROUND_TRIP[:2], [WEATHER], False),
    "unicode": (UNICODE, [WEATHER], True),
}


@functools.cache
def reference(folder: Path) -> Any:
    """transformers' tokenizer of a checkpoint: it takes a second to make."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def render(source: str, messages: Sequence[Mapping[str, Any]] = (), **options: Any) -> str:
    return ChatTemplate(source).render(messages, **options)


def refusal(source: str, messages: Sequence[Mapping[str, Any]] = ()) -> str:
    """The message of the TemplateError that rendering ends with: one line."""
    with pytest.raises(TemplateError) as error:
        render(source, messages)
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# The same text as transformers


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_renders_as_transformers_renders_it(lab: Path, name: str) -> None:
    messages, tools, prompt = CONVERSATIONS[name]
    ours = Tokenizer.from_folder(lab).apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)
    theirs = reference(lab).apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    assert ours == theirs


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_thinking_conversation_renders_as_transformers_renders_it(shared: Path, name: str) -> None:
    messages, tools, prompt = CONVERSATIONS[name]
    source = (shared / "lab" / "templates" / "lab_think.jinja").read_text(encoding="utf-8")
    ours = render(source, messages, tools=tools, add_generation_prompt=prompt)
    theirs = reference(shared / "lab" / "olmo3-lab-chat").apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False, chat_template=source
    )
    assert ours == theirs
    assert ours.endswith("<think>") == prompt


@pytest.mark.parametrize(
    "source",
    [
        "  {% if messages %}\n    {{ messages[0].content }}\n  {% endif %}\n  end\n",  # block trimming
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
        "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ tools | tojson }}",
        "{{ tools is defined }}{{ tools is none }}{{ documents is defined }}{{ add_generation_prompt }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
        "{{ messages | map(attribute='role') | list }}{{ nothing }}",
    ],
)
def test_a_template_meets_the_same_environment_as_in_transformers(shared: Path, source: str) -> None:
    folder = shared / "lab" / "olmo3-lab-chat"
    special = {name: f"<|{text}|>" for name, text in (("bos_token", "endoftext"), ("pad_token", "pad"))}
    ours = ChatTemplate(source, {**special, "eos_token": special["bos_token"]}).render(TWO_TURNS)
    theirs = reference(folder).apply_chat_template(
        TWO_TURNS, tokenize=False, add_generation_prompt=True, chat_template=source
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "arguments", ["separators=(',', ':')", "sort_keys=true", "ensure_ascii=true", "indent=1, sort_keys=true"]
)
def test_tojson_takes_the_arguments_that_it_takes_in_transformers(shared: Path, arguments: str) -> None:
    source = "{{ tools | tojson(" + arguments + ") }}"
    theirs = reference(shared / "lab" / "olmo3-lab-chat").apply_chat_template(
        USER, tools=[WEATHER, ADD], tokenize=False, chat_template=source
    )
    assert render(source, USER, tools=[WEATHER, ADD]) == theirs


# The end of an assistant's turn


def test_only_the_last_assistant_turn_ends_with_endoftext(demo: tuple[Any, Tokenizer]) -> None:
    messages = [*TWO_TURNS, {"role": "assistant", "content": "Rain."}]
    text = demo[1].apply_chat_template(messages, add_generation_prompt=False)
    assert "Clear.<|im_end|>\n<|im_start|>user" in text
    assert text.endswith("Rain.<|endoftext|>")
    assert text.count("<|endoftext|>") == 1


# JSON


def test_tojson_keeps_the_order_and_escapes_nothing() -> None:
    value = {"z": "<a> & 'b' \"c\" > é 漢 😀", "a": [1, 2.5, None, True], "m": {"y": 1, "b": 2}}
    text = render("{{ tools[0] | tojson }}", USER, tools=[value])
    assert text == '{"z": "<a> & \'b\' \\"c\\" > é 漢 😀", "a": [1, 2.5, null, true], "m": {"y": 1, "b": 2}}'


def test_tojson_of_an_undefined_value_is_a_template_error() -> None:
    refusal("{{ nothing | tojson }}")


# Tool calls


def test_arguments_as_json_text_render_as_a_dict_does(demo: tuple[Any, Tokenizer]) -> None:
    arguments = {"city": "Zürich <&>", "days": [1, 2], "a": None}
    texts = []
    for form in (arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=1)):
        message = {"role": "assistant", "content": None, "tool_calls": [call("f", form)]}
        texts.append(demo[1].apply_chat_template([*USER, message], add_generation_prompt=False))
    assert 'f(city="Zürich <&>", days=[1, 2], a=null)' in texts[0]
    assert texts[1] == texts[2] == texts[0]


def test_rendering_leaves_the_callers_messages_as_they_were(demo: tuple[Any, Tokenizer]) -> None:
    messages = [*USER, {"role": "assistant", "content": "", "tool_calls": [call("f", '{"a": 1}')]}]
    before = copy.deepcopy(messages)
    demo[1].apply_chat_template(messages, tools=[WEATHER])
    assert messages == before


def test_a_tool_call_without_the_function_wrapper_is_understood(demo: tuple[Any, Tokenizer]) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    assert "f(a=1)" in demo[1].apply_chat_template([*USER, message])


@pytest.mark.parametrize("arguments", ["{", "city=Paris", '{"a": }', "[1]", "3", '"text"'])
def test_arguments_that_are_no_json_object_are_a_template_error(
    demo: tuple[Any, Tokenizer], arguments: str
) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", arguments)]}
    with pytest.raises(TemplateError) as error:
        demo[1].apply_chat_template([*USER, message])
    assert "\n" not in str(error.value)


def test_bad_json_arguments_are_reported_with_the_functions_name() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", "{")]}
    assert "get_weather" in refusal("{{ messages }}", [message])


@pytest.mark.parametrize("calls", [["get_weather"], [3], [{"function": "f"}], 3, "f", [None]])
def test_tool_calls_of_the_wrong_shape_are_a_template_error(calls: Any) -> None:
    refusal("{{ messages }}", [{"role": "assistant", "content": "", "tool_calls": calls}])


@pytest.mark.parametrize("messages", [["Hello"], [3], [None]])
def test_messages_that_are_no_mappings_are_a_template_error(messages: Any) -> None:
    refusal("{{ messages }}", messages)


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"content": "Hello"}, {"role": "user", "content": None}]
)
def test_a_message_that_lacks_what_the_template_needs_is_a_template_error(
    demo: tuple[Any, Tokenizer], message: dict[str, Any]
) -> None:
    with pytest.raises(TemplateError) as error:
        demo[1].apply_chat_template([message])
    assert "\n" not in str(error.value)


# What a template can name


def test_tools_are_always_defined_and_none_without_any() -> None:
    assert render("{{ tools is defined }} {{ tools is none }}", USER) == "True True"
    assert render("{{ tools is defined }} {{ tools | length }}", USER, tools=[ADD]) == "True 1"


def test_a_template_that_refuses_messages_is_quoted(demo: tuple[Any, Tokenizer]) -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate!') }}{% endif %}ok"
    assert render(source, USER) == "ok"
    assert "Roles must alternate!" in refusal(source, SYSTEM)


def test_what_a_template_says_over_several_lines_is_reported_on_one() -> None:
    message = refusal("{{ raise_exception('first\nsecond') }}")
    assert "first" in message
    assert "second" in message


def test_strftime_now_is_the_time_now() -> None:
    before = datetime.datetime.now().replace(microsecond=0)
    text = render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}")
    assert before <= datetime.datetime.strptime(text, "%Y-%m-%d %H:%M:%S") <= datetime.datetime.now()


# Untrusted templates


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.datetime.sys }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_that_reaches_for_more_than_its_data_is_refused(source: str) -> None:
    messages = copy.deepcopy(USER)
    refusal(source, messages)
    assert messages == USER


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ nothing.x }}",
        "{{ none + 1 }}",
        "{{ [1][5].x }}",
        "{{ strftime_now(3) }}",
        "{{ messages | nofilter }}",
        "{{ 1 | dictsort }}",
        "{{ 1 | xmlattr }}",
        "{% break %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_template_error(source: str) -> None:
    refusal(source, USER)
