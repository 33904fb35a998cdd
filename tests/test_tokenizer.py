"""Tokenizers: the tiny world's words round trip, Hugging Face folders read as transformers reads them, refusals."""

import json
import os

import pytest

from r1jax.checkpoints import tokenizer
from r1jax.data import corpus, tasks

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def saved(folder, **changes):
    """Returns a folder with the tiny tokenizer; `changes` go into tokenizer_config.json, None removes a field."""
    tokenizer.tiny().save(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_tiny_tokenizer_gives_every_word_its_own_id():
    tiny = tokenizer.tiny()
    assert [tiny.encode(word) for word in tasks.vocabulary()] == [[index] for index in range(tiny.vocab_size)]


def test_tiny_tokenizer_round_trips_every_document_without_an_unknown_word():
    tiny = tokenizer.tiny()
    unknown = tasks.vocabulary().index("<unk>")
    texts = corpus.documents(300, seed=5, drill_fraction=0.3)
    rows = [tiny.encode(text) for text in texts]
    assert len(rows) == 300
    assert tiny.decode_batch(rows) == [" ".join(text.split()).removesuffix(" <eos>") for text in texts]
    assert not any(unknown in row for row in rows)


def test_tiny_tokenizer_ids_fill_the_vocabulary_and_name_the_special_tokens():
    tiny = tokenizer.tiny()
    assert tiny.vocab_size == len(tasks.vocabulary())
    ids = {name: tasks.vocabulary().index(name) for name in ("<bos>", "<eos>", "<pad>")}
    assert (tiny.bos_id, tiny.eos_id, tiny.pad_id) == (ids["<bos>"], ids["<eos>"], ids["<pad>"])


def test_decode_leaves_out_the_end_and_the_padding_only():
    tiny = tokenizer.tiny()
    words = [word for word in tasks.vocabulary() if word not in tasks.SPECIAL_TOKENS][:3]
    ids = tiny.encode(" ".join(words))
    assert tiny.decode([tiny.bos_id, *ids, tiny.eos_id, tiny.pad_id]) == " ".join(["<bos>", *words])
    assert tiny.decode_batch([ids, []]) == [" ".join(words), ""]


def test_save_and_from_folder_keep_ids_special_tokens_and_template(tmp_path):
    original = tokenizer.tiny()
    again = tokenizer.from_folder(saved(tmp_path, chat_template=CHAT))
    text = " ".join(tasks.vocabulary())
    assert again.encode(text) == original.encode(text)
    assert (again.bos_id, again.eos_id, again.pad_id) == (original.bos_id, original.eos_id, original.pad_id)
    assert again.chat_template == CHAT


def test_special_tokens_may_be_objects_and_padding_falls_back_to_the_end(tmp_path):
    folder = saved(tmp_path, eos_token={"content": "<eos>", "lstrip": False}, pad_token=None)
    loaded = tokenizer.from_folder(folder)
    assert loaded.eos_id == loaded.pad_id == tokenizer.tiny().eos_id


def test_chat_template_is_rendered_with_and_without_the_generation_prompt(tmp_path):
    loaded = tokenizer.from_folder(saved(tmp_path, chat_template=CHAT))
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.render_chat(messages) == "[user]hi<eos>>"
    assert loaded.render_chat(messages, add_generation_prompt=False) == "[user]hi<eos>"


def test_chat_template_file_wins_and_a_list_gives_its_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert tokenizer.from_folder(saved(tmp_path, chat_template=named)).render_chat([]) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert tokenizer.from_folder(tmp_path).render_chat([]) == "file"


def refused(folder) -> str:
    with pytest.raises(ValueError) as error:
        tokenizer.from_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_from_folder_says_that_tokenizer_json_is_missing(tmp_path):
    assert "no tokenizer.json" in refused(tmp_path)


def test_from_folder_refuses_a_tokenizer_json_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer.json" in refused(tmp_path)


def test_from_folder_needs_an_end_token(tmp_path):
    assert "no eos_token" in refused(saved(tmp_path, eos_token=None))
    assert "no eos_token" in refused(saved(tmp_path, eos_token="<never>"))


def test_render_chat_without_a_template_names_the_setting_to_change(tmp_path):
    with pytest.raises(ValueError, match="no chat template; set --config.data.template"):
        tokenizer.from_folder(saved(tmp_path)).render_chat([])


# SmolLM2 against transformers

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  indented\n\n\tcode = {'a': 1}  # ümlaut 你好 🙂",
    "<|im_start|>user\nWhat is 12345 + 67?<|im_end|>\n",
    "",
)
CONVERSATION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]


@pytest.fixture(scope="module")
def both(smollm2_folder):
    """Returns (our tokenizer, transformers' tokenizer) of SmolLM2."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        if os.environ.get("CI", "").lower() == "true":
            raise
        pytest.skip("no transformers; pip install '.[parity]'")
    return tokenizer.from_folder(smollm2_folder), AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_equal_transformers_and_decode_back(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.backend.decode(ids, skip_special_tokens=False) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2]], ids=["system", "default_system"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompted", "closed"])
def test_smollm2_chat_text_equals_transformers(both, messages, prompt):
    ours, theirs = both
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.render_chat(messages, add_generation_prompt=prompt) == wanted


def test_from_folder_refuses_a_tokenizer_config_that_is_not_json(tmp_path):
    (saved(tmp_path) / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% for %}", "{{ messages.__class__.__mro__ }}{{ x.y }}"],
)
def test_a_template_that_fails_is_a_one_line_error(tmp_path, template):
    loaded = tokenizer.from_folder(saved(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="chat template") as error:
        loaded.render_chat([])
    assert "\n" not in str(error.value)
