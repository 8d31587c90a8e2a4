"""Conversations read back from what chat templates made of them."""

from __future__ import annotations

from typing import Any

import pytest

from sarm.config import UserError
from sarm.data.conversations import template_text
from serving.transcripts import Transcripts

TALKS = [
    [("user", "How can I do it?")],
    [("system", "Be kind.\nAlways."), ("user", "How?\n\nAnd why?")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("system", "s"), ("user", "a"), ("assistant", ""), ("user", "user: c"), ("assistant", "d"),
     ("user", "<b>e</b> {{ f }}")],
]  # fmt: skip

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are an assistant.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen 2.5 and SmolLM2 have it: a system turn of its own where none is given."""
DATED = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{"
    " strftime_now('%d %b %Y') }}\n\n{% if messages[0]['role'] == 'system' %}{{"
    " messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{"
    " m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""As Llama 3.2's, which prints today."""
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{"
    " raise_exception('no system') }}{% endif %}<start_of_turn>{{ 'model' if m['role'] =="
    " 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""As Gemma's."""


def tokenizer_of(template: str | None) -> Any:
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<start_of_turn>"]}
    )
    if template:
        tokenizer.chat_template = template
    return tokenizer


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
@pytest.mark.parametrize("template", [None, CHATML, DATED, NO_SYSTEM])
def test_a_rendered_conversation_is_read_back(
    template: str | None, talk: list[tuple[str, str]]
) -> None:
    tokenizer, want = tokenizer_of(template), messages(talk)
    if template == NO_SYSTEM:
        want = [m for m in want if m["role"] != "system"]
    prompt = template_text(tokenizer, want, add_generation_prompt=True)
    transcripts = Transcripts(tokenizer, [tokenizer.eos_token_id])
    assert transcripts.prompt(prompt) == want
    # with the prompt, and without it
    for given in (prompt, None):
        said = transcripts.read(prompt + " It goes\nso.<|eot_id|>", given)
        assert said == (want, "It goes\nso.", True)
    assert transcripts.read(prompt + "It goes", prompt).ended is False
    assert transcripts.read(prompt, prompt).response == ""


def test_the_day_that_a_template_prints_may_be_another() -> None:
    tokenizer, want = tokenizer_of(DATED), messages(TALKS[1])
    prompt = template_text(tokenizer, want, add_generation_prompt=True)
    assert "26 Jul 2024" in prompt
    other = prompt.replace("26 Jul 2024", "3 December 2026")
    assert Transcripts(tokenizer).prompt(other) == want


def test_plain_prompts_are_user_turns_and_foreign_ones_are_refused() -> None:
    transcripts = Transcripts(tokenizer_of(None), [3])
    assert transcripts.read("Q: How?\nA: So.<|eot_id|>", "Q: How?\nA:") == (
        [{"role": "user", "content": "Q: How?\nA:"}],
        "So.",
        True,
    )
    foreign = template_text(tokenizer_of(CHATML), messages(TALKS[0]), add_generation_prompt=True)
    ours = template_text(tokenizer_of(None), messages(TALKS[0]))
    for prompt in (foreign + "<|eot_id|>", ours):  # another template; a turn that is not opened
        with pytest.raises(UserError, match="no conversation with an opened assistant turn"):
            transcripts.prompt(prompt)


def test_a_prompt_cut_at_its_beginning_and_one_decoded_otherwise_are_found_again() -> None:
    tokenizer = tokenizer_of(None)
    long = messages([("user", "first take the thing , then make the other thing . " * 4)])
    prompt = template_text(tokenizer, long, add_generation_prompt=True)
    transcripts = Transcripts(tokenizer, [3])
    cut = transcripts.read(prompt[60:] + "So it is.", prompt)
    assert cut.prompt == [{"role": "user", "content": long[0]["content"].strip()}]
    assert cut.response == "So it is."
    tidied = prompt.replace(" ,", ",").replace(" .", ".")
    assert transcripts.read(tidied + " So.", prompt).response == "So."
    with pytest.raises(UserError, match="does not begin with its prompt"):
        transcripts.read("So it is.", prompt)


def test_special_tokens_of_a_response_are_no_text_of_it() -> None:
    transcripts = Transcripts(tokenizer_of(None), [3])
    said = transcripts.read("How?So<|start_header_id|> it is.<|eot_id|><|eot_id|>", "How?")
    assert said.response == "So it is." and said.ended


def test_the_embedded_policys_texts_are_read_back() -> None:
    """By its own tokenizer, through tokens and back, as a trainer sends them."""
    from sarm.config import ROOT, load_config
    from serving.scorer import transcripts_of

    try:
        transcripts = transcripts_of(load_config(ROOT / "configs" / "smollm2.yaml"))
    except UserError:
        pytest.skip("the embedded model is not fetched here")
    tokenizer = transcripts.tokenizer
    for talk in TALKS:
        want = messages(talk)
        prompt = template_text(tokenizer, want, add_generation_prompt=True)
        ids = tokenizer(prompt + "Sure.<|im_end|>", add_special_tokens=False)["input_ids"]
        query = tokenizer.decode(ids, skip_special_tokens=False)
        assert transcripts.read(query, prompt) == (want, "Sure.", True)
