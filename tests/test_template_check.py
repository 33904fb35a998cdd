"""Claims about templates that open the thinking, and about the start-up check that finds those that zero a reward."""

import gzip
import json
import re
import shutil

import jinja2
import numpy as np
import pytest

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import tokenizer
from r1jax.data import templates
from r1jax.data.problems import Problem
from r1jax.recipe import export_hf, prompts, template_check
from r1jax.recipe.parts import AskingParts
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.rl import rollout
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import Config, DataConfig, RewardConfig, SamplerConfig, parts_of, replace

PROMPT = Problem("1", "math", "What is 1 + 1?", "2", "en")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
ENDINGS = {
    "bare": "{% endif %}",
    "opened": "<think>\n{% endif %}",
    "written": "{{ '<think>\\n' }}{% endif %}",
    "unbroken": "<think>{% endif %}",
    "shut": "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "begun": "{{ '<think>\\nFirst, ' }}{% endif %}",
}


def words(chat: str = "") -> tokenizer.Tokenizer:
    """Returns a tokenizer of single characters and the tags, so that any text survives, with a chat template."""
    import tokenizers

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {text: index for index, text in enumerate(["<eos>", "<think>", "</think>", *characters])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(["<eos>", "<think>", "</think>"])
    return tokenizer.Tokenizer(tokenizer.JsonBackend(inner), {"eos_token": "<eos>"}, chat)


def settings(template: str = "chat", prefilled: bool = False, **reward) -> Config:
    data = DataConfig(path="rows.jsonl", template=template, think_prefill=prefilled)
    return Config(stage="r1_zero", data=data, reward=RewardConfig(**reward))


def check(config: Config, own: tokenizer.Tokenizer, task: str = "math") -> None:
    asked = [rollout.EncodedPrompt(Problem("1", task, "q", "1"), np.zeros(1, np.int32))]
    template_check.check(config.stage, config.data, config.reward, own, asked)


def refusal(*arguments) -> str:
    with pytest.raises(ValueError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("template", ["plain", "tiny", "r1_zero", "chat"])
def test_think_prefill_ends_every_template_in_one_opening(template):
    plain = templates.render("q", template, chat=lambda messages: "chat:")
    assert templates.render("q", template, chat=lambda messages: "chat:", think_prefill=True) == f"{plain}<think>\n"


@pytest.mark.parametrize("ending", ["opened", "written", "unbroken", "bare"])
def test_think_prefill_opens_once_whatever_the_template_does(ending):
    own_config = settings(prefilled=True)
    text = prompts.render("q", own_config.stage, own_config.data, words(CHAT + ENDINGS[ending]))
    assert text.endswith("<assistant><think>\n") and text.count("<think>") == 1


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("q<think>\n", "<think>\n"),
        ("q<think>", "<think>"),
        ("q<think>\n\n", "<think>\n\n"),
        ("<think> q", ""),
        ("", ""),
    ],
)
def test_prefill_is_the_opening_that_ends_a_prompt(text, opened):
    assert templates.prefill(text) == opened


@pytest.mark.parametrize("prefilled", [True, False])
def test_a_rollout_is_graded_with_the_think_that_its_prompt_holds(prefilled):
    own = words()
    own_config = settings("plain", prefilled)
    (asked,) = prompts.encode([PROMPT], parts_of(AskingParts, own_config), own)
    response = "1 and 1 more</think><answer>2</answer>"
    text, none = response if prefilled else f"<think>{response}", np.zeros(0, np.float32)
    sample = RolloutSample(0, 0, asked.ids, np.asarray(own.encode(text)), none, none, "stop", 0)
    with RewardPool(RewardConfig()) as pool:
        parts, _ = rollout.grade([sample, sample], [asked, asked], [text, response], pool)
    assert parts[0].tolist()[:2] == [1.0, 1.0] and parts[1].tolist()[:2] == [1.0, float(prefilled)]
    assert own.decode(asked.ids.tolist()) == f"What is 1 + 1?{asked.prefill}"


# The check passes


@pytest.mark.parametrize("prefilled", [False, True])
@pytest.mark.parametrize("spec", ["r1_zero:tiny", "stage2_reasoning_rl", "stage4_all_scenarios", "student_rl"])
def test_the_tiny_stages_pass_with_and_without_a_prefilled_think(spec, prefilled):
    config = configs.load(spec, [("data.think_prefill", str(prefilled))])
    check(config, tokenizer.tiny(), "linear")
    check(replace(config, reward=RewardConfig(reward_model=config.reward.reward_model)), tokenizer.tiny(), "linear")


@pytest.mark.parametrize("prefilled", [False, True])
@pytest.mark.parametrize("extraction", ["auto", "boxed", "answer_tag"])
@pytest.mark.parametrize("ending", ["bare", "opened", "written", "unbroken"])
def test_a_chat_template_passes_whether_it_opens_the_thinking_or_not(ending, extraction, prefilled):
    check(settings(prefilled=prefilled, extraction=extraction), words(CHAT + ENDINGS[ending]))


@pytest.mark.parametrize("template", ["plain", "r1_zero"])
def test_the_other_templates_pass(template):
    for prefilled in (False, True):
        check(settings(template, prefilled), words())


def test_tasks_that_nothing_can_be_made_for_are_not_checked():
    check(settings(), words("no question"), "general")


@pytest.mark.parametrize("prefilled", [False, True])
def test_the_released_r1_tokenizer_passes_and_its_prompt_ends_as_asked(shared_data, tmp_path, prefilled):
    with gzip.open(shared_data / "deepseek_r1" / "tokenizer.json.gz") as packed:
        (tmp_path / "tokenizer.json").write_bytes(packed.read())
    shutil.copy(shared_data / "deepseek_r1" / "tokenizer_config.json", tmp_path)
    r1, config = tokenizer.from_folder(tmp_path), settings(prefilled=prefilled, extraction="boxed")
    check(config, r1)
    own_config = replace(config, sampler=SamplerConfig(max_prompt_tokens=64))
    (asked,) = prompts.encode([PROMPT], parts_of(AskingParts, own_config), r1)
    assistant, think, line_break = 128804, 128798, 201
    assert asked.ids.tolist()[-3:] == ([assistant, think, line_break] if prefilled else [*r1.encode("1?"), assistant])
    assert asked.prefill == ("<think>\n" if prefilled else "")


# The check stops the run


def test_a_template_that_shuts_the_thinking_is_refused_by_name():
    text = refusal(settings(), words(CHAT + ENDINGS["shut"]))
    assert "config.data.template=chat, config.data.think_prefill=false, config.reward.extraction=auto" in text
    assert "gets format 0" in text and r"<think>\n\n</think>" in text


def test_a_template_that_begins_the_thought_is_refused_because_its_opening_would_not_be_graded():
    assert "gets format 0" in refusal(settings(), words(CHAT + ENDINGS["begun"]))


def test_an_answer_in_another_place_than_the_format_wants_is_refused():
    text = refusal(settings("plain", extraction="whole"), words())
    assert "config.reward.extraction=whole" in text and "gets format 0" in text
    assert "set config.reward.format=0 if it is not wanted" in text
    check(settings("plain", extraction="whole", format=0.0), words())


def test_a_tokenizer_that_loses_a_tag_is_refused():
    own = words()

    class Lossy(tokenizer.JsonBackend):
        """Decodes without the thinking tags, as with skip_special_tokens."""

        def decode(self, ids):
            return re.sub("</?think>", "", super().decode(ids))

    broken = tokenizer.Tokenizer(Lossy(own.backend._inner), own.config, own.chat_template)
    assert "gets format 0" in refusal(settings("plain"), broken)
    check(settings("plain", format=0.0), broken)


def test_a_template_without_the_question_is_refused():
    assert "leaves the question out, it gives 'hello'" in refusal(settings(), words("hello"))


def test_a_run_stops_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(template_check, "_answer", lambda value, task, extraction: value)
    for config, field in (("r1_zero", "grpo.updates=1"), ("evaluate:tiny", f"checkpoint={tmp_path}")):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        assert launch.main([f"--config={config}", f"--config.{field}", f"--workdir={tmp_path}/runs"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert "start-up check of config.data.template=tiny" in lines[-1] and "accuracy 0" in lines[-1]
    assert not (tmp_path / "runs").exists()


# The exported template


@pytest.mark.parametrize("kind", ["plain", "r1_zero", "tiny"])
def test_exported_template_opens_the_thinking_as_training_did(kind):
    own = tokenizer.tiny()
    own_config = settings(kind, prefilled=True)
    made = export_hf.chat_template(own_config.stage, own_config.data, own)
    rendered = tokenizer.Tokenizer(own.backend, own.config, made).render_chat([{"role": "user", "content": "a\nb"}])
    assert rendered == templates.render("a\nb", kind, think_prefill=True)
    assert rendered.endswith("<think>\n")


@pytest.mark.parametrize("ending", ["bare", "opened", "written", "unbroken"])
def test_exported_chat_template_opens_the_thinking_once_and_only_when_a_turn_is_asked_for(ending):
    own, asked = words(CHAT + ENDINGS[ending]), [{"role": "user", "content": "q"}]
    own_config = settings(prefilled=True)
    made = tokenizer.Tokenizer(own.backend, own.config, export_hf.chat_template(own_config.stage, own_config.data, own))
    assert made.render_chat(asked) == "<user>q<assistant><think>\n"
    assert made.render_chat(asked, add_generation_prompt=False) == "<user>q"
    if ending != "unbroken":  # as transformers would render it
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(made.chat_template).render(messages=asked, add_generation_prompt=True)
        assert text == "<user>q<assistant><think>\n"
    own_config = settings()
    assert export_hf.chat_template(own_config.stage, own_config.data, own) == own.chat_template


def test_export_reads_the_prefill_of_the_run(tmp_path):
    fields = configs.flatten(configs.load("student_rl", [("data.think_prefill", "true")]))
    read = export_hf.stage_config(tmp_path, json.loads(json.dumps(fields)), Config())
    assert read.data.think_prefill and read.data.template == "auto"


def test_reward_request_holds_the_prefill_before_the_response():
    request = RewardRequest("1", "math", "q", "b</think>c", "c", prefill="<think>\n")
    assert request.text == "<think>\nb</think>c"
