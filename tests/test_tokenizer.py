"""Tokenizers: the tiny world's words round trip, Hugging Face folders read as transformers reads them, refusals."""

import gzip
import json
import os
import shutil
import threading
import time

import pytest
import sentencepiece

from r1jax.checkpoints import chat, sentencepiece_model, tokenizer
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


def test_special_tokens_map_fills_what_tokenizer_config_leaves_open(tmp_path):
    saved(tmp_path, eos_token=None, pad_token="<pad>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<eos>"}, "pad_token": "<unk>"}')
    loaded = tokenizer.from_folder(tmp_path)
    assert (loaded.eos_id, loaded.pad_id) == (tokenizer.tiny().eos_id, tokenizer.tiny().pad_id)


def refused(folder) -> str:
    with pytest.raises(ValueError) as error:
        tokenizer.from_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_from_folder_refuses_a_chat_template_that_is_no_text(tmp_path):
    assert "chat_template must be text" in refused(saved(tmp_path, chat_template=7))
    assert not tokenizer.from_folder(saved(tmp_path, chat_template=[{"name": "default"}, 3])).chat_template


def test_from_folder_says_that_tokenizer_json_is_missing(tmp_path):
    assert "no tokenizer.json and no tokenizer.model" in refused(tmp_path)


def test_from_folder_refuses_a_tokenizer_json_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer.json" in refused(tmp_path)


def test_from_folder_needs_an_end_token(tmp_path):
    remedy = "name the token that ends a response as eos_token in tokenizer_config.json"
    assert f"no eos_token; {remedy}" in refused(saved(tmp_path, eos_token=None, pad_token=None))
    assert f"no eos_token in the vocabulary (eos_token='<never>'); {remedy}" in refused(
        saved(tmp_path, eos_token="<never>")
    )


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


def parity():
    """Returns the module transformers; without it the test is skipped, or fails when CI=true."""
    try:
        import transformers
    except ImportError:
        if os.environ.get("CI", "").lower() == "true":
            raise
        pytest.skip("no transformers; pip install '.[parity]'")
    return transformers


@pytest.fixture(scope="module")
def both(smollm2_folder):
    """Returns (our tokenizer, transformers' tokenizer) of SmolLM2."""
    theirs = parity().AutoTokenizer.from_pretrained(smollm2_folder)
    return tokenizer.from_folder(smollm2_folder), theirs


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_equal_transformers_and_decode_back(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.backend.decode(ids) == text
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
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ messages.__class__.__mro__ }}{{ x.y }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ 1e308 * 10 % 1e-320 }}{{ (1e200) ** 2 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ range(10 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 9 ** 999999999 }}",
        "{{ messages[0].content }}",
        "{{ 'a\nb'.index('c') }}",
        "{{ ''.join(1) }}",
    ],
)
def test_a_template_that_fails_is_a_one_line_error_at_once(tmp_path, template):
    loaded = tokenizer.from_folder(saved(tmp_path, chat_template=template))
    started = time.monotonic()
    with pytest.raises(ValueError, match="chat template") as error:
        loaded.render_chat([])
    assert "\n" not in str(error.value) and time.monotonic() - started < 2


def test_a_template_that_loops_is_stopped_at_the_deadline(monkeypatch):
    monkeypatch.setattr(chat, "DEADLINE_S", 0.2)
    loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"TimeoutError: not rendered within 0\.2 s"):
        chat.render(loop, {})
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        (f"{{{{ '%{2**62}d' % 1 }}}}", "MemoryError"),
    ],
)
def test_what_a_template_raises_is_named_once(template, message):
    with pytest.raises(ValueError) as error:
        chat.render(template, {})
    assert str(error.value) == message


def test_rendering_works_in_another_thread_and_knows_loop_controls_and_plain_json():
    template = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    found = []
    thread = threading.Thread(target=lambda: found.append(chat.render(template, {"messages": [{"a": "<é>"}, 2]})))
    thread.start()
    thread.join()
    assert found == ['{"a": "<é>"}']


# The tokenizer of the released R1


def test_r1_tokenizer_renders_its_chat_and_knows_its_tags(shared_data, tmp_path):
    with gzip.open(shared_data / "deepseek_r1" / "tokenizer.json.gz") as packed:
        with (tmp_path / "tokenizer.json").open("wb") as file:
            shutil.copyfileobj(packed, file)
    shutil.copy(shared_data / "deepseek_r1" / "tokenizer_config.json", tmp_path)
    r1 = tokenizer.from_folder(tmp_path)
    text = r1.render_chat([{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1"}])
    assert text == "<｜begin▁of▁sentence｜>s<｜User｜>1 + 1<｜Assistant｜>"  # without <think>
    ids = r1.encode(text)
    assert (ids[0], ids[-1], r1.bos_id, r1.eos_id, r1.pad_id, r1.vocab_size) == (0, 128804, 0, 1, 1, 128815)
    assert r1.encode("<think>\n</think>") == [128798, 201, 128799]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>t</think>b"}]
    assert "<｜Assistant｜>b<｜end▁of▁sentence｜>" in r1.render_chat([*turns, {"role": "user", "content": "c"}])
    assert r1.decode(r1.encode("<think>\nümlaut 你好 🙂</think>\n")) == "<think>\nümlaut 你好 🙂</think>\n"


# Sentencepiece

SPOKEN = (
    "solve 7 x + 5 = 40 and think about it",
    "<think>\nwait, no</think>the answer is 5</s>",
    "two  spaces, a\ttab\nand a line",
    "ümlaut 你好 🙂 <unknown> <unk>",
    "<think><think>",
    "",
)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Returns a folder with a small BPE model as Llama's: bytes for what it does not know, text taken as it is."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus_file = folder / "corpus.txt"
    corpus_file.write_text("\n".join(corpus.documents(300, seed=1, drill_fraction=0.3)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus_file),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("corpus.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    decoder = {
        str(420 + place): {"content": text, "special": special, "normalized": False}
        for place, (text, special) in enumerate((("<think>", False), ("</think>", False), ("<pad>", True)))
    }
    config |= {"pad_token": "<pad>", "added_tokens_decoder": decoder, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_sentencepiece_model_gives_the_librarys_own_ids_for_plain_text(spoken):
    loaded = tokenizer.from_folder(spoken)
    library = sentencepiece.SentencePieceProcessor(model_file=str(spoken / "tokenizer.model"))
    for text in (SPOKEN[0], SPOKEN[2], "你好 🙂", "  indented"):
        assert loaded.encode(text) == library.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (1, 2, 422, 423)


def test_sentencepiece_special_tokens_are_one_id_each_and_decode_back(spoken):
    loaded = tokenizer.from_folder(spoken)
    ids = loaded.encode("<s><think>a</think> b")
    assert [ids[0], ids[1], ids.count(421)] == [1, 420, 1]
    assert loaded.decode(ids) == "<s><think>a</think> b"
    assert loaded.decode([*ids, loaded.eos_id, loaded.pad_id, 9999]) == "<s><think>a</think> b"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("text", SPOKEN)
def test_sentencepiece_ids_equal_transformers(spoken, tmp_path, text, legacy):
    # For text that begins with a space the two differ: transformers leaves out the model's own leading space there.
    transformers = parity()
    shutil.copytree(spoken, tmp_path, dirs_exist_ok=True)
    config = json.loads((spoken / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer.from_folder(tmp_path)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.backend.decode(ids) == text


@pytest.mark.parametrize("stated", [None, True, False])
def test_sentencepiece_prompts_begin_as_transformers_begins_them(spoken, tmp_path, stated):
    transformers = parity()
    shutil.copytree(spoken, tmp_path, dirs_exist_ok=True)
    config = json.loads((spoken / "tokenizer_config.json").read_text())
    config |= {} if stated is None else {"add_bos_token": stated}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer.from_folder(tmp_path)
    for text in SPOKEN:
        assert ours.encode_prompt(text) == theirs.encode(text)
        assert ours.encode_prompt(f"<s>{text}")[:2].count(ours.bos_id) == 1


def test_saved_sentencepiece_folder_reads_the_same_and_holds_the_same_model(spoken, tmp_path):
    original = tokenizer.from_folder(spoken)
    original.chat_template = CHAT
    original.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (spoken / "tokenizer.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    again = tokenizer.from_folder(tmp_path)
    assert [again.encode(text) for text in SPOKEN] == [original.encode(text) for text in SPOKEN]
    assert (again.pad_id, again.vocab_size, again.chat_template) == (422, 423, CHAT)


def test_a_model_alone_names_its_own_tokens_and_added_tokens_json_is_read(spoken, tmp_path):
    shutil.copy(spoken / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<think>": 420}')
    loaded = tokenizer.from_folder(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (1, 2, 2, 421)
    assert loaded.encode("<think>") == [420]
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert tokenizer.from_folder(tmp_path / "again").encode("<think>") == [420]


def test_transformers_reads_the_added_tokens_of_a_saved_sentencepiece_folder(spoken, tmp_path):
    shutil.copy(spoken / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"</think>": 421, "<think>": 420}')
    (tmp_path / "saved").mkdir()
    ours = tokenizer.from_folder(tmp_path)
    ours.save(tmp_path / "saved")
    theirs = parity().AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "<think>wait</think>5</s>"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert ours.encode(text)[0] == 420 and ours.encode(text)[-1] == ours.eos_id == theirs.eos_token_id


def test_tokenizer_json_wins_over_a_model_beside_it(spoken, tmp_path):
    shutil.copy(spoken / "tokenizer.model", saved(tmp_path))
    assert isinstance(tokenizer.from_folder(tmp_path).backend, tokenizer.JsonBackend)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x00" * 100, b"\xff" * 50])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model is no sentencepiece model" in refused(tmp_path)


def test_a_truncated_model_and_odd_added_tokens_are_refused(spoken, tmp_path):
    content = (spoken / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2 + 1])
    assert "tokenizer.model is no sentencepiece model" in refused(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "added_tokens.json").write_text('{"<think>": "x"}')
    assert "added tokens must be given as numbers and texts" in refused(tmp_path)


def test_leading_space_goes_where_the_config_says(spoken):
    content = (spoken / "tokenizer.model").read_bytes()
    made = {
        prefix: sentencepiece_model.SentencePieceBackend(content, {"<think>": 420}, (), prefix)
        for prefix in ("first", "always", "never")
    }
    ids = {prefix: backend.encode("wait<think>wait") for prefix, backend in made.items()}
    spaced, bare = made["always"].encode("wait"), made["never"].encode("wait")
    assert spaced != bare
    assert ids == {
        "first": [*spaced, 420, *bare],
        "always": [*spaced, 420, *spaced],
        "never": [*bare, 420, *bare],
    }
    assert {backend.decode(ids[prefix]) for prefix, backend in made.items()} == {"wait<think>wait"}
