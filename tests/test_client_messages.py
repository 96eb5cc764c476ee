"""Messages as clients write them: rendered as transformers does, and never a Python error."""

from pathlib import Path
from typing import Any

import pytest
from test_chat_template import ADD, USER, Messages, call, reference

from olmo3_mlx import Olmo3, TemplateError, Tokenizer, generate
from olmo3_mlx.text.chat_template import ChatTemplate
from olmo3_mlx.text.client_messages import normalized

ASKS_AND_CALLS: Messages = [
    {"role": "user", "content": "Add 1 and 2.", "name": None},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [call("add", {"a": 1, "b": 2})],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3", "name": None},
]
WITH_NULLS: dict[str, Messages] = {
    "a name": [{"role": "user", "content": "Hello", "name": None}],
    "calls without content": ASKS_AND_CALLS,
    "content without calls": [
        *USER,
        {"role": "assistant", "content": "Clear.", "tool_calls": None, "reasoning_content": None},
        *USER,
    ],
    "neither": [*USER, {"role": "assistant", "content": None, "tool_calls": None}, *USER],
}


@pytest.mark.parametrize("name", WITH_NULLS)
def test_keys_that_are_null_render_as_in_transformers(lab: Path, name: str) -> None:
    options: dict[str, Any] = {"tools": [ADD], "add_generation_prompt": True}
    expected = reference(lab).apply_chat_template(WITH_NULLS[name], tokenize=False, **options)
    assert Tokenizer.from_folder(lab).apply_chat_template(WITH_NULLS[name], **options) == expected
    assert "None" not in expected


class Dumped:
    """A message of a library that has objects for them."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self) -> dict[str, Any]:
        return self.fields


# What a client sends, and the same as templates know it.
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text parts": (
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "One two"},
    ),
    "parts of the responses API": (
        {"role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {"role": "user", "content": "One"},
    ),
    "its answer sent back": (
        {"role": "assistant", "content": [{"type": "output_text", "text": "Two"}]},
        {"role": "assistant", "content": "Two"},
    ),
    "a part without a type": (
        {"role": "user", "content": [{"text": "One"}]},
        {"role": "user", "content": "One"},
    ),
    "texts in a list": ({"role": "user", "content": ["One ", "two"]}, {"role": "user", "content": "One two"}),
    "no parts": ({"role": "user", "content": []}, {"role": "user", "content": ""}),
    "a tuple of parts": ({"role": "user", "content": ("One",)}, {"role": "user", "content": "One"}),
    "a developer": ({"role": "developer", "content": "Brief."}, {"role": "system", "content": "Brief."}),
    "an object": (Dumped(role="user", content="One", name=None), {"role": "user", "content": "One"}),
    "objects within": (
        {"role": "assistant", "content": None, "tool_calls": [Dumped(**call("add", {"a": 1}))]},
        {"role": "assistant", "tool_calls": [call("add", {"a": 1})]},
    ),
    "arguments as text": (
        {"role": "assistant", "tool_calls": [call("add", '{"a": 1}')]},
        {"role": "assistant", "tool_calls": [call("add", {"a": 1})]},
    ),
    "arguments as an empty text": (
        {"role": "assistant", "tool_calls": [call("now", "")]},
        {"role": "assistant", "tool_calls": [call("now", {})]},
    ),
    "no arguments": (
        {"role": "assistant", "tool_calls": [call("now", None)]},
        {"role": "assistant", "tool_calls": [call("now", {})]},
    ),
    "no calls in a list": (
        {"role": "assistant", "content": "One", "tool_calls": []},
        {"role": "assistant", "content": "One", "tool_calls": []},
    ),
}


@pytest.mark.parametrize(("sent", "meant"), FORMS.values(), ids=FORMS)
def test_a_form_that_clients_send_is_the_one_that_templates_know(sent: Any, meant: dict[str, Any]) -> None:
    assert normalized([sent]) == [meant]


WRONG: dict[str, tuple[Any, str]] = {
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "text alone: .*image_url",
    ),
    "a file": ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "text alone"),
    "sound": ([{"role": "user", "content": [{"type": "input_audio"}]}], "text alone"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "text alone"),
    "a null part": ([{"role": "user", "content": [None]}], "text alone"),
    "a number": ([{"role": "user", "content": 3}], "expected a text as content of the user's message, got 3"),
    "an object for content": ([{"role": "user", "content": {"text": "x"}}], "expected a text as content"),
    "bytes": ([{"role": "user", "content": b"x"}], "expected a text as content"),
    "no content": ([{"role": "user"}], "expected a text as content of the user's message, got none"),
    "null for a user's content": ([{"role": "user", "content": None}], "got none"),
    "null for a tool's content": ([{"role": "tool", "content": None}], "got none"),
    "no role": ([{"content": "x"}], "expected a message with a role"),
    "null for a role": ([{"role": None, "content": "x"}], "expected a message with a role"),
    "a number for a role": ([{"role": 1, "content": "x"}], "expected a message with a role"),
    "a text for a list": ("Hello", "expected a list of messages"),
    "one message for a list": ({"role": "user", "content": "x"}, "expected a list of messages"),
    "a number for a list": (3, "expected a list of messages"),
    "null for a message": ([None], "expected messages with a role and content, got None"),
    "a custom tool": (
        [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "x"}}]}],
        "expected tool_calls with a function's name",
    ),
    "calls as a text": ([{"role": "assistant", "tool_calls": "add()"}], "expected a list of tool_calls"),
    "arguments in a list": (
        [{"role": "assistant", "tool_calls": [call("f", "[1]")]}],
        "arguments of 'f', got",
    ),
    "arguments as a number": (
        [{"role": "assistant", "tool_calls": [call("f", 3)]}],
        "arguments of 'f', got 3",
    ),
}


@pytest.mark.parametrize(("messages", "said"), WRONG.values(), ids=WRONG)
def test_what_no_template_could_render_is_refused_in_a_line(messages: Any, said: str) -> None:
    with pytest.raises(TemplateError, match=said) as error:
        ChatTemplate("{{ messages }}").render(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tools", ["add", {"type": "function"}, ["add"], [None], 3])
def test_tools_that_are_none_are_refused_in_a_line(tools: Any) -> None:
    with pytest.raises(TemplateError, match="expected a list of tools"):
        ChatTemplate("{{ tools }}").render(USER, tools=tools)


# Messages that a template has no place for


ONLY_KNOWN = """\
{% for m in messages %}
{% if m.role in ('user', 'assistant') or (m.role == 'system' and loop.first) %}
{{ m.role }}: {{ m.content | trim }}
{% endif %}
{% endfor %}
"""


@pytest.mark.parametrize(
    ("messages", "place", "role"),
    [
        ([{"role": "critic", "content": "No."}, *USER], 1, "critic"),
        ([*USER, {"role": "tool", "content": "3"}], 2, "tool"),
        ([*USER, {"role": "system", "content": "Be brief."}, *USER], 2, "system"),
        ([*USER, {"role": "developer", "content": "Be brief."}], 2, "system"),
    ],
)
def test_a_message_that_the_template_would_pass_over_is_refused(
    messages: Messages, place: int, role: str
) -> None:
    template = ChatTemplate(ONLY_KNOWN)
    with pytest.raises(TemplateError, match=f"leaves out message {place}, whose role is {role}: expected"):
        template.render(messages)
    assert template.render(USER) == "user: Weather in Paris?\n"


def test_a_role_that_the_template_knows_is_rendered_as_it_stands(demo: tuple[Olmo3, Tokenizer]) -> None:
    prompt = demo[1].apply_chat_template([*USER, {"role": "critic", "content": "No."}])
    assert "<|im_start|>critic\nNo.<|im_end|>" in prompt


# Going on with the assistant's message


def test_an_answer_that_was_begun_is_gone_on_with(demo: tuple[Olmo3, Tokenizer]) -> None:
    model, tokenizer = demo
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    whole = generate(model, tokenizer, question, temperature=0).text
    for cut in (1, 5, len(whole) - 1):
        begun = [*question, {"role": "assistant", "content": whole[:cut]}]
        prompt = tokenizer.apply_chat_template(begun, continue_final_message=True)
        assert prompt == tokenizer.apply_chat_template(question) + whole[:cut]
    begun = [*question, {"role": "assistant", "content": "17 + 25 ="}]
    assert generate(model, tokenizer, begun, temperature=0, continue_final_message=True).text == " 42"
    assert generate(model, tokenizer, begun, temperature=0).text != " 42"  # another answer, to nothing


def test_spaces_at_the_end_of_what_was_begun_stay() -> None:
    begun = [*USER, {"role": "assistant", "content": "Clear: "}]
    assert ChatTemplate(ONLY_KNOWN).render(begun, continue_final_message=True).endswith("assistant: Clear: ")


@pytest.mark.parametrize(
    "messages",
    [
        USER,
        [],
        [*USER, {"role": "assistant", "tool_calls": [call("add", {})]}],
        [*USER, {"role": "tool", "content": "3"}],
    ],
)
def test_only_an_assistants_text_can_be_gone_on_with(messages: Messages) -> None:
    with pytest.raises(TemplateError, match="only an assistant's message can be continued"):
        ChatTemplate("{{ messages }}").render(messages, continue_final_message=True)


def test_a_template_that_drops_what_is_to_be_gone_on_with_is_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(TemplateError, match="leaves out the message that is to be continued"):
        template.render([*USER, {"role": "assistant", "content": "Clear"}], continue_final_message=True)


# Marks for training


def test_what_the_assistant_says_is_rendered_where_it_is_marked_for_training() -> None:
    said = "{% generation %}{% set x = m.content %}{{ x }}!{% endgeneration %}"
    source = "{% for m in messages %}" + said + "{% endfor %}"
    assert ChatTemplate(source).render(USER) == "Weather in Paris?!"
    with pytest.raises(TemplateError, match="not valid"):
        ChatTemplate("{% generation %}{{ messages }}").render(USER)
