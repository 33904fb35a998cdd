"""Stops, vocabulary and templates of real checkpoints: what once went wrong in silence, on small folders made for it."""

import json
import re

import numpy as np
import pytest
import toy_checkpoint
from io_cases import io_case
from toy_checkpoint import CHATML, SPECIAL

from r1jax import config as configs
from r1jax.checkpoints import chat, tokenizer
from r1jax.core import metrics, rng
from r1jax.data.problems import Problem
from r1jax.models import decoder, logprobs
from r1jax.recipe import common, policy, prompts, sft_rows
from r1jax.recipe.parts import AskingParts
from r1jax.rl.logprobs import Scorer
from r1jax.rl.settings import of_config
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Config, DataConfig, ModelConfig, SamplerConfig, parts_of, replace

PROBLEMS = [Problem(f"p{n}", "math", f"{n}+{n}", str(2 * n), "en") for n in range(6)]
END, START, TURN = 256, 257, 258  # ids of SPECIAL


def opened(folder, **fields):
    """Returns (config, tokenizer, mesh, weights) of a checkpoint as every stage opens it."""
    config = Config(model=ModelConfig(checkpoint=str(folder)), sampler=SamplerConfig(**fields))
    config, words, mesh = common.prepare(config)
    return config, words, mesh, common.load_weights(config.model, mesh, str(folder))


def drawn(config, words, mesh, params, temperature=1.0, groups=4, samples=8, longest=24, steps=4):
    """Returns samples of a few prompts under the stops that every stage uses."""
    sizes = dict(slots=8, steps_per_dispatch=steps, max_prompt_tokens=24, max_new_tokens=longest)
    engine = Engine(config.network, replace(config.sampler, **sizes), mesh, words.stop_ids, words)
    sampling = SamplingParams(temperature, max_new_tokens=longest, stop_ids=words.stop_ids)
    requests = []
    for draw in range(groups):
        keys = rng.sample_keys(0, "toy", np.full(samples, draw), np.arange(samples), "sample")
        requests.append(
            RolloutRequest(draw, np.asarray(words.encode_prompt(f"{draw} + {draw}"), np.int32), keys, sampling)
        )
    return RolloutSampler(engine).generate(requests, engine.load_params(params))


def assert_trainer_agrees(config, mesh, params, samples, temperature=1.0):
    """The trainer's log-probs, by every function that a loss takes them from, are the sampler's."""
    length = max(len(s.prompt_ids) + len(s.token_ids) for s in samples)
    tokens, targets = np.zeros((2, len(samples), length), np.int32)
    mask, drawn_logp = np.zeros((2, len(samples), length), np.float32)
    for row, s in enumerate(samples):
        whole, prompt = np.concatenate([s.prompt_ids, s.token_ids]), len(s.prompt_ids)
        tokens[row, : len(whole)], targets[row, : len(whole) - 1] = whole, whole[1:]
        mask[row, prompt - 1 : len(whole) - 1], drawn_logp[row, prompt - 1 : len(whole) - 1] = 1, s.logps
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    segments = (positions < [[len(s.prompt_ids) + len(s.token_ids)] for s in samples]).astype(np.int32)
    batch = dict(tokens=tokens, targets=targets, positions=positions, segments=segments)
    scored = Scorer(config.network, mesh)(params, {name: value[None] for name, value in batch.items()}, 1, temperature)
    assert np.abs((scored[0] - drawn_logp) * mask).max() < 1e-5
    hidden, _, _ = decoder.forward(params, tokens, positions, segments, config.network)
    for how in (dict(trained_chunk=16), dict(chunk_tokens=8), {}):
        found = logprobs.scored_logprobs(
            hidden, decoder.unembedding(params), targets, mask, temperature, **how, **logprobs.settings(config.compute)
        )
        assert np.abs((np.asarray(found[0]) - drawn_logp) * mask).max() < 1e-5
        assert (np.asarray(found[1]) * mask).max() <= np.log(
            config.compute.vocab_used or config.model.vocab_size
        ) + 1e-5


# Vocabulary


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_are_never_drawn_nor_normalised_over(tmp_path, temperature):
    case = io_case("ids-without-a-token")["input"]
    size, rows = case["tokenizer_tokens"], case["config"]["vocab_size"]
    folder = toy_checkpoint.write(tmp_path, rows, loud_from=size, shape=case["config"])
    config, words, mesh, params = opened(folder)
    assert (config.model.vocab_size, config.compute.vocab_used, words.vocab_size) == (rows, size, size)
    samples = drawn(config, words, mesh, params, temperature)
    assert max(s.token_ids.max() for s in samples) < size
    assert_trainer_agrees(config, mesh, params, samples)
    # Without the bound every token is such an id: the weights are those of the case.
    whole = replace(config, compute=replace(config.compute, vocab_used=0))
    beyond = drawn(whole, words, mesh, params, temperature, groups=2)
    assert min(s.token_ids.min() for s in beyond) >= size


def test_a_tokenizer_larger_than_the_model_is_refused_when_the_folder_is_opened(tmp_path):
    case = io_case("tokenizer-larger-than-the-model")["input"]
    folder = toy_checkpoint.write(tmp_path, case["config"]["vocab_size"], shape=case["config"])
    with pytest.raises(ValueError, match=rf"{case['tokenizer_tokens']} ids.*{case['config']['vocab_size']} rows"):
        opened(folder)


def test_a_tokenizer_with_gaps_counts_to_its_highest_id(tmp_path):
    toy_checkpoint.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far"] = 300
    path.write_text(json.dumps(content))
    words = tokenizer.from_folder(tmp_path)
    assert words.vocab_size == 301
    assert tokenizer.vocab_used(ModelConfig(vocab_size=320), words) == 301
    assert tokenizer.vocab_used(ModelConfig(vocab_size=301), words) == 0


# Stops


def test_a_response_ends_at_either_end_token_of_generation_config(tmp_path, capsys):
    case = io_case("end-tokens-of-generation-config")["input"]
    assert case["tokenizer_config"]["eos_token"] == SPECIAL[0]
    folder = toy_checkpoint.stops(toy_checkpoint.write(tmp_path, 259), generation=[TURN, END])
    config, words, mesh, params = opened(folder)
    assert words.stop_ids == (END, TURN)
    samples = drawn(config, words, mesh, params, temperature=3.0, groups=8, samples=16, longest=64)
    ends = [int(s.token_ids[-1]) for s in samples if s.finish_reason == "stop"]
    assert {END, TURN} == set(ends) and len(ends) < len(samples)
    for s in samples:
        assert not np.isin(s.token_ids[:-1], words.stop_ids).any()
        assert not words.decode(s.token_ids).endswith(SPECIAL)
    assert capsys.readouterr().err == ""


def test_stop_ids_are_a_union_in_order_and_a_saved_folder_keeps_them(tmp_path):
    special = (*SPECIAL, "<|eot|>", "<|eom|>", "<|other|>")
    folder = toy_checkpoint.write_tokenizer(tmp_path / "a", special, chat_template=CHATML)
    toy_checkpoint.stops(folder, config=260, generation=[259, 256])
    words = tokenizer.from_folder(folder)
    assert words.stop_ids == (256, 260, 259, 258) and words.end_of_turn_id == 258
    further = words.stopping_at((261, 258))
    assert further.stop_ids == (256, 260, 259, 261, 258) and words.stop_ids == (256, 260, 259, 258)
    assert words.stopping_at((259,)) is words
    (tmp_path / "b").mkdir()
    words.save(tmp_path / "b")
    assert set(tokenizer.from_folder(tmp_path / "b").stop_ids) == {256, 260, 259, 258}
    with pytest.raises(ValueError, match="stop id 262 is none of the 262 ids"):
        words.stopping_at((262,))


@pytest.mark.parametrize("stated", ["</s>", True, [2, None], {"id": 2}, 2.5])
def test_an_end_token_that_is_no_number_is_refused(tmp_path, stated):
    folder = toy_checkpoint.stops(toy_checkpoint.write_tokenizer(tmp_path), generation=stated)
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id holds .*needs a token's number"):
        tokenizer.from_folder(folder)


def test_odd_end_tokens_are_said(tmp_path, capsys):
    folder = toy_checkpoint.stops(toy_checkpoint.write_tokenizer(tmp_path), config=2, generation=[128001])
    assert tokenizer.from_folder(folder).stop_ids == (END, 2)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "eos_token_id 2 of config.json is the ordinary token '#'" in told[0]
    assert "128001 of generation_config.json is none of the 259 ids" in told[1]


TURN_ENDS = {
    "chatml": (CHATML, 258, ""),
    "end token": ("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}", 256, ""),
    "nothing": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", 256, ""),
    "parts": ("{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}", 258, ""),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
        *(258, ""),
    ),
    "several": ("{% for m in messages %}{{ m.content }}</turn>\n{% endfor %}", 256, "'</turn>'"),
    "fails": ("{{ raise_exception('no') }}", 256, ""),
}


@pytest.mark.parametrize("name", TURN_ENDS)
def test_the_end_of_turn_is_what_the_template_writes_after_the_assistant(tmp_path, capsys, name):
    template, end, warned = TURN_ENDS[name]
    words = tokenizer.from_folder(toy_checkpoint.write_tokenizer(tmp_path, chat_template=template))
    assert (words.end_of_turn_id, words.stop_ids) == (end, tuple(dict.fromkeys((256, end))))
    assert words.end_of_turn_id == end
    told = capsys.readouterr().err.splitlines()
    assert len(told) == bool(warned) and all(warned in line and "sampler.stop_strings" in line for line in told)


def test_decode_leaves_out_stop_ids_at_the_end_alone(tmp_path):
    folder = toy_checkpoint.stops(toy_checkpoint.write_tokenizer(tmp_path), generation=[START])
    words, ids = tokenizer.from_folder(folder), None
    ids = words.encode("a<|im_start|>b")
    assert words.decode([*ids, START]) == words.decode([*ids, START, END, START]) == "a<|im_start|>b"
    assert words.decode([*ids, TURN]) == "a<|im_start|>b<|im_end|>"
    assert words.stopping_at((TURN,)).decode([*ids, TURN]) == "a<|im_start|>b"


def test_too_many_or_unknown_stop_ids_are_refused(tmp_path):
    config, words, mesh, _ = opened(toy_checkpoint.write(tmp_path, 259))
    build = lambda stops, **fields: Engine(config.network, SamplerConfig(**fields), mesh, stops, words)  # noqa: E731
    assert build(tuple(range(12)), stop_ids=(3, 20)).stop_ids == (*range(12), 20)
    with pytest.raises(ValueError, match="17 stop ids .*at most 16 fit a slot"):
        build(tuple(range(16)), stop_ids=(16,))
    with pytest.raises(ValueError, match="stop id 259 is none of the model's vocab_size=259"):
        build((259,))
    with pytest.raises(ValueError, match="stop id 300 is none of the 259 ids"):
        opened(tmp_path, stop_ids=(300,))
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        RolloutSampler(Engine(config.network, SamplerConfig(stop_strings=("a",)), mesh, (0,)))
    for bad in (dict(stop_strings=("",)), dict(stop_ids=(-1,))):
        with pytest.raises(ValueError, match="SamplerConfig.stop_"):
            SamplerConfig(**bad)


def by_hand(words, sample, texts):
    """Returns how many tokens of a sample there are up to the first stop text, by decoding every prefix whole."""
    prefixes = range(1, len(sample.token_ids) + 1)
    return next((n for n in prefixes if any(t in words.decode(sample.token_ids[:n]) for t in texts)), None)


def test_stop_strings_end_a_sample_at_the_token_that_completes_one_whatever_the_steps(tmp_path):
    config, words, mesh, params = opened(toy_checkpoint.write(tmp_path, 259))
    free = drawn(config, words, mesh, params, longest=40)
    pairs = re.findall(
        r"[!-~]{2}", " ".join(words.decode(s.token_ids)[3:] for s in free)
    )  # most bytes are no characters
    texts = (*pairs[:3], pairs[-1][0], "no such text at all")
    assert len(pairs) > 3
    stopping = replace(config, sampler=replace(config.sampler, stop_strings=texts))
    cut = {}
    for steps in (1, 4, 7):
        found = drawn(stopping, words, mesh, params, longest=40, steps=steps)
        for whole, s in zip(free, found, strict=True):
            kept = by_hand(words, whole, texts)
            cut[steps] = cut.get(steps, 0) + (kept is not None)
            wanted = whole.token_ids[:kept]
            assert np.array_equal(s.token_ids, wanted)
            assert s.finish_reason == ("stop" if kept is not None else whole.finish_reason)
            np.testing.assert_allclose(s.logps, whole.logps[: len(wanted)], atol=1e-6)
            assert len(s.logps) == len(s.behaviour_logps) == len(wanted)
    assert cut[1] == cut[4] == cut[7] and 2 <= cut[1] < len(free)


def test_stop_strings_at_the_last_token_or_over_many_are_found_in_long_texts(tmp_path):
    from r1jax.sampler.stop_strings import StopStrings

    words = tokenizer.from_folder(toy_checkpoint.write_tokenizer(tmp_path))
    ids = words.encode("ümlaut 你好 🙂 " * 40 + "the end: ###" + "and more")
    before = len(words.encode("ümlaut 你好 🙂 " * 40 + "the end: ###"))
    for size in (1, 3, len(ids)):
        follow, found = StopStrings(words.decode, ("end: ###", "你 好")), None
        for start in range(0, len(ids), size):
            if (count := follow.count(ids[start : start + size])) is not None:
                found = start + count
                break
        assert found == before


# Prompts and responses


def transformers_of(folder):
    from test_tokenizer import parity

    return parity().AutoTokenizer.from_pretrained(folder)


PROMPTS = ("1 + 1", "", "<|im_start|>user\n1<|im_end|>", "<|endoftext|>hi", "  ümlaut 你好")


@pytest.mark.parametrize("bos", ["", "<|im_start|>", "<|endoftext|>"])
def test_prompts_begin_as_the_post_processor_has_it_once(tmp_path, bos):
    folder = toy_checkpoint.write_tokenizer(tmp_path, bos=bos, **({"bos_token": bos} if bos else {}))
    ours, theirs = tokenizer.from_folder(folder), transformers_of(folder)
    for text in PROMPTS:
        wanted = theirs(text).input_ids
        if bos and text.startswith(bos):
            wanted = wanted[1:]  # the text spells it: transformers doubles it
        assert ours.encode_prompt(text) == wanted
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert not bos or wanted.count(ours.bos_id) >= 1 and wanted[:2].count(ours.bos_id) == 1


def test_an_end_that_the_post_processor_adds_is_not_put_behind_a_prompt(tmp_path):
    from tokenizers import processors

    made = toy_checkpoint.byte_tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", START), ("<|endoftext|>", END)]
    )
    toy_checkpoint.write_tokenizer(tmp_path, bos_token="<|im_start|>")
    made.save(str(tmp_path / "tokenizer.json"))
    words = tokenizer.from_folder(tmp_path)
    assert words.encode_prompt("ab") == [START, *words.encode("ab")]


@pytest.mark.parametrize("stated", [True, False, None])
def test_add_bos_token_speaks_where_the_tokenizer_json_puts_nothing(tmp_path, stated):
    words = tokenizer.from_folder(
        toy_checkpoint.write_tokenizer(tmp_path, bos_token="<|im_start|>", add_bos_token=stated)
    )
    assert words.encode_prompt("ab") == [START] * (stated is True) + words.encode("ab")


def test_a_response_has_one_end_token_also_when_its_text_spells_one(tmp_path):
    words = tokenizer.from_folder(toy_checkpoint.write_tokenizer(tmp_path, chat_template=CHATML))
    plain = words.encode("an answer")
    for text in ("an answer", "an answer<|im_end|>", "an answer<|im_end|>\n", "an answer<|endoftext|> <|im_end|>\n"):
        assert words.encode_response(text) == [*plain, TURN]
        assert words.encode_response(text, words.eos_id) == [*plain, END]
    assert words.encode_response("a<|im_end|>b \n") == [*words.encode("a<|im_end|>b \n"), TURN]
    assert words.encode_response("") == [TURN]


@pytest.mark.parametrize(("template", "end"), [("chat", TURN), ("plain", END), ("r1_zero", END)])
def test_fine_tuning_ends_every_example_once_as_its_template_does(tmp_path, template, end):
    words = tokenizer.from_folder(toy_checkpoint.write_tokenizer(tmp_path, chat_template=CHATML))
    for text in ("r", "r<|im_end|>", "r<|endoftext|>\n"):
        (item,) = sft_rows.items_of({"prompt": "q", "response": text}, "", DataConfig(template=template), words)
        assert item.tokens[item.loss_mask > 0].tolist() == [*words.encode("r"), end]


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "x\udc80"])
def test_a_lone_surrogate_is_one_line(tmp_path, text):
    words = tokenizer.from_folder(toy_checkpoint.write_tokenizer(tmp_path))
    for encode in (words.encode, words.encode_prompt, words.encode_response, tokenizer.tiny().encode):
        with pytest.raises(ValueError, match=r"the text has a lone surrogate, '\\ud") as refused:
            encode(text)
        assert "\n" not in str(refused.value)


# Templates


def with_template(folder, template, **config):
    return tokenizer.from_folder(toy_checkpoint.write_tokenizer(folder, chat_template=template, **config))


def test_strftime_now_renders_one_date_and_says_it_once(tmp_path, capsys):
    template = io_case("strftime-now")["input"]["template"]
    chat._say_date.cache_clear()
    words = with_template(tmp_path, template)
    texts = {words.render_chat([{"role": "user", "content": "Hi"}]) for _ in range(3)}
    assert texts == {f"Today is {chat.TODAY:%d %b %Y}\nHi"}
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{chat.TODAY:%Y-%m-%d}" in told


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q <é>"},
    {"role": "assistant", "content": "a\n"},
    {"role": "user", "content": "and?"},
]


def test_generation_tags_render_their_content(tmp_path):
    words = with_template(tmp_path, io_case("generation-tag")["input"]["template"])
    assert words.render_chat(TURNS, add_generation_prompt=False) == "s\nq <é>\na\n<eos>and?\n"


def test_every_named_special_token_is_given_to_the_template(tmp_path):
    case = io_case("special-tokens-in-templates")["input"]
    words = with_template(tmp_path, case["template"], **case["tokenizer_config"])
    assert words.render_chat([{"role": "user", "content": "q"}]) == "<|im_start|>q"


def test_content_is_given_as_parts_where_the_template_wants_them(tmp_path):
    words = with_template(tmp_path, io_case("content-parts")["input"]["template"])
    assert words.render_chat([{"role": "user", "content": "the question"}]) == "the question"
    mixed = "{% for m in messages %}{{ m.content if m.role == 'system' else m.content[0]['text'] }}{% endfor %}"
    turns = [{"role": "system", "content": "rules "}, {"role": "user", "content": "the question"}]
    assert with_template(tmp_path, mixed).render_chat(turns) == "rules the question"


def test_a_default_template_among_named_ones_is_used_and_its_lack_is_said(tmp_path, capsys):
    named = {"default": "D{{ messages[0].content }}", "tool_use": "T"}
    assert with_template(tmp_path, named).chat_template == named.pop("default")
    assert with_template(tmp_path, named).chat_template == ""
    assert "none of the chat templates (tool_use) is named default" in capsys.readouterr().err


def test_stops_of_a_text_part_count_and_stop_strings_are_said_not_to_be_read(tmp_path, capsys):
    folder = toy_checkpoint.write_tokenizer(tmp_path / "several")
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [258]}}), encoding="utf-8")
    (folder / "generation_config.json").write_text('\ufeff{"stop_strings": ["User:"]}', encoding="utf-8")
    assert tokenizer.from_folder(folder).stop_ids == (256, 258)
    assert "stop_strings of generation_config.json are not read" in capsys.readouterr().err


OTHERS = {
    "names": "{{ bos_token }}|{{ cls_token }}|{{ mask_token }}|{{ image_token }}|{{ unk_token is defined }}|{{ sep_token }}",
    "tools": "{% if tools is not none %}tools{% endif %}{% if documents is defined %}d{{ documents }}{% endif %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true) }}"
    "{{ {'b': 1, 'a': '<é>'} | tojson(separators=(',', ':'), ensure_ascii=True) }}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {%- endif %}\n{% endfor %}",
    "generation": "{% for m in messages %}{%- generation -%}\n{{ m.content }}\n{% endgeneration %}|{% endfor %}",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}"
    "{% endif %}{% endfor %}",
    "chatml": CHATML,
    "loop": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_templates_render_as_transformers_renders_them(tmp_path, name, prompted):
    named = {"bos_token": "<|im_start|>", "cls_token": "<|im_end|>", "mask_token": "<|endoftext|>"}
    words = with_template(tmp_path, OTHERS[name], image_token="<|im_end|>", **named)
    wanted = transformers_of(tmp_path).apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompted)
    assert words.render_chat(TURNS, add_generation_prompt=prompted) == wanted


@pytest.mark.parametrize("turns", [TURNS, TURNS[1:2]], ids=["several", "one"])
def test_r1_prompts_equal_transformers_and_begin_with_one_bos(shared_data, tmp_path, turns):
    import gzip
    import shutil

    with gzip.open(shared_data / "deepseek_r1" / "tokenizer.json.gz") as packed:
        with (tmp_path / "tokenizer.json").open("wb") as file:
            shutil.copyfileobj(packed, file)
    shutil.copy(shared_data / "deepseek_r1" / "tokenizer_config.json", tmp_path)
    r1, theirs = tokenizer.from_folder(tmp_path), transformers_of(tmp_path)
    text = r1.render_chat(turns)
    assert text == theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert r1.encode_prompt(text) == theirs(text, add_special_tokens=False).input_ids
    base = r1.encode_prompt("User: 1 + 1")  # its tokenizer_config.json: add_bos_token true
    assert base == [r1.bos_id, *theirs("User: 1 + 1", add_special_tokens=False).input_ids]
    assert (r1.stop_ids, r1.end_of_turn_id) == ((1,), 1)


# All of it at once


def test_a_padded_model_with_two_end_tokens_and_another_end_of_turn_trains_on_what_it_samples(tmp_path):
    special = (*SPECIAL, "<|eot|>")
    folder = toy_checkpoint.write(tmp_path / "model", 260 + 300, loud_from=260, special=special, chat_template=CHATML)
    toy_checkpoint.stops(folder, generation=[256, 259])
    fields = {"model.checkpoint": folder, "grpo.updates": 2, "grpo.prompts_per_update": 2, "grpo.group_size": 4}
    fields |= {"grpo.updates_per_rollout": 1, "sampler.slots": 8, "sampler.max_new_tokens": 40, "sampler.windows": ()}
    fields |= {
        "sampler.max_prompt_tokens": 64,
        "pack.row_tokens": 128,
        "sampler.temperature": 2.0,
        "compute.remat": "false",
    }
    config = configs.load("r1_zero:smollm2_135m", [(name, str(value)) for name, value in fields.items()])
    config, words, mesh = common.prepare(config)
    assert words.stop_ids == (256, 259, 258) and config.compute.vocab_used == 260
    params = common.load_weights(config.model, mesh, str(folder))
    own_config = replace(config, data=replace(config.data, template="chat"))
    train = prompts.encode(PROBLEMS, parts_of(AskingParts, own_config), words)
    seen = []
    training = policy.make_training(of_config(config), words, mesh, train, params, tmp_path / "run")
    generate = training.source.sampling.sampler.generate
    training.source.sampling.sampler.generate = lambda *given: seen.extend(found := generate(*given)) or found
    training.train()
    assert len(seen) == 16 and max(s.token_ids.max() for s in seen) < 260
    ends = {int(s.token_ids[-1]) for s in seen if s.finish_reason == "stop"}
    assert ends and ends <= {256, 258, 259}
    rows = metrics.read(tmp_path / "run")
    assert [row["update"] for row in rows] == [1, 2]
    assert all(0 < row["max_logprob_difference"] < 1e-5 for row in rows)
