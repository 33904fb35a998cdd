"""Claims about rows of examples as tokens: which are trained, of one turn and of several, against transformers' own mask."""

import numpy as np
import pytest
from small import byte_tokenizer as words

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.recipe import fine_tuning, sft_rows
from r1jax.schema import Config, DataConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WITHOUT_THOUGHTS = PLAIN.replace(
    "{{ m['content'] }}<|im_end|>{{ '\n' }}{% else %}",
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>{{ '\n' }}{% else %}",
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>two and two</think>4"},
    {"role": "user", "content": "and one more?"},
    {"role": "assistant", "content": "<think>four and one</think>5"},
]


def row(turns: list[dict] = TURNS) -> dict:
    return {"prompt": turns[:-1], "response": turns[-1]["content"], "messages": turns}


def trained(item, own: Tokenizer) -> str:
    return own.backend.decode(item.tokens[item.loss_mask > 0].tolist())


def whole(item, own: Tokenizer) -> str:
    return own.backend.decode(item.tokens.tolist())


CHAT = Config(stage="distill", data=DataConfig(template="chat"))


def test_every_assistant_turn_of_a_conversation_is_trained_with_its_end():
    own = words(PLAIN)
    (item,) = sft_rows.items_of(row(), CHAT.stage, CHAT.data, own)
    assert trained(item, own) == "<think>two and two</think>4<|im_end|><think>four and one</think>5<|im_end|>"
    assert whole(item, own) == own.render_chat(TURNS, add_generation_prompt=False).removesuffix("\n")


def test_mask_is_that_of_transformers_for_a_template_that_marks_generation(tmp_path):
    transformers = pytest.importorskip("transformers")
    own = words(PLAIN)
    own.backend.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|im_end|>", chat_template=CHATML
    )
    found = theirs.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (item,) = sft_rows.items_of(row(), CHAT.stage, CHAT.data, own)
    count = len(item.tokens)  # the template goes on with a line break that nobody samples
    assert item.tokens.tolist() == found["input_ids"][:count] and len(found["input_ids"]) == count + 1
    assert item.loss_mask.tolist() == found["assistant_masks"][:count]


def test_each_turn_is_an_example_where_the_template_drops_earlier_thoughts():
    own = words(WITHOUT_THOUGHTS)
    first, second = sft_rows.items_of(row(), CHAT.stage, CHAT.data, own)
    assert trained(first, own) == "<think>two and two</think>4<|im_end|>"
    assert trained(second, own) == "<think>four and one</think>5<|im_end|>"
    assert "two and two" not in whole(second, own) and "assistant\n4<|im_end|>" in whole(second, own)


@pytest.mark.parametrize("template", ["r1_zero", "plain"])
def test_only_the_last_turn_is_trained_under_a_template_without_turns(template):
    own = words(PLAIN)
    (item,) = sft_rows.items_of(row(), "distill", DataConfig(template=template), own)
    assert trained(item, own) == "<think>four and one</think>5<|im_end|>"
    assert "Assistant: <think>two and two</think>4" in whole(item, own)


def test_turns_of_a_prompt_that_no_example_gave_are_not_trained():
    own = words(PLAIN)
    (item,) = sft_rows.items_of({"prompt": TURNS[:-1], "response": "5"}, CHAT.stage, CHAT.data, own)
    assert trained(item, own) == "5<|im_end|>"


def test_an_instruction_stands_before_the_question_that_each_turn_answers():
    own = words(PLAIN)
    config = Config(stage="distill", data=DataConfig(template="chat", instruction="Think."))
    first, second = sft_rows.items_of(row(), config.stage, config.data, own)
    assert "Think.\n2+2?" in whole(first, own) and "Think.\nand one more?" in whole(second, own)
    assert "Think.\n2+2?" not in whole(second, own)


def test_a_prefilled_think_is_trained_in_no_turn():
    own = words(PLAIN)
    config = Config(stage="distill", data=DataConfig(template="chat", think_prefill=True))
    turns = [turn | {"content": turn["content"].replace("<think>", "<think>\n")} for turn in TURNS]
    (item,) = sft_rows.items_of(row(turns), config.stage, config.data, own)
    assert trained(item, own) == "two and two</think>4<|im_end|>four and one</think>5<|im_end|>"
    assert whole(item, own) == own.render_chat(turns, add_generation_prompt=False).removesuffix("\n")


def test_an_end_that_a_response_spells_out_is_trained_once():
    own = words(PLAIN)
    (spelled,) = sft_rows.items_of({"prompt": "q", "response": "5<|im_end|>"}, CHAT.stage, CHAT.data, own)
    (bare,) = sft_rows.items_of({"prompt": "q", "response": "5"}, CHAT.stage, CHAT.data, own)
    np.testing.assert_array_equal(spelled.tokens, bare.tokens)


def test_examples_that_do_not_fit_are_counted_by_example_not_by_row(capsys):
    own = words(WITHOUT_THOUGHTS)
    items = sft_rows.items_of(row(), CHAT.stage, CHAT.data, own)
    lengths = np.sort([len(item.tokens) for item in items])
    assert len(fine_tuning.fitting(lengths, lengths[0])) == 1
    assert f"1 of 2 examples exceed {lengths[0]} tokens (longest {lengths[1]}), left out" in capsys.readouterr().err
