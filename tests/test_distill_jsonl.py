"""Claims about distillation from a file of examples: what is trained, what is refused, and that it resumes by content."""

import json

import numpy as np
import pytest
import sentencepiece

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import hf_config, hf_export, tokenizer
from r1jax.core import rng, sharding
from r1jax.core.metrics import read
from r1jax.data import corpus, files, jsonl, tasks, templates, turns
from r1jax.models import decoder
from r1jax.recipe import distill, example_files, fine_tuning, parts, problems, prompts, sft_rows
from r1jax.schema import DataConfig, DistillConfig, MeshConfig, RewardConfig, parts_of, replace

SHORT = (
    "sft.epochs=1",
    "sft.examples_per_update=16",
    "evaluation.samples_per_problem=1",
    "evaluation.max_problems=8",
    "sampler.slots=8",
)


def solved(problem: tasks.Linear, language: str = "en") -> dict:
    """Returns a row of the tiny world: the equation and one right guess."""
    product = problem.a * problem.x
    thought = f"{problem.a} * {problem.x} = {product} + {problem.b} = {problem.c} = {problem.c} ok"
    return {
        "prompt": problem.text(language),
        "response": f"<think> {thought} </think> <answer> {problem.x} </answer>",
    }


def examples(path, count: int = 64) -> str:
    """Writes `count` training problems with their solutions and returns the path."""
    train, _ = tasks.linear_problems()
    jsonl.write(path, [solved(problem) for problem in train[:: len(train) // count][:count]])
    return str(path)


def arguments(workdir, *changes: str) -> list[str]:
    return ["--config=distill", f"--workdir={workdir}", *(f"--config.{change}" for change in (*SHORT, *changes))]


def refused(given: list[str], capsys) -> str:
    """Returns the one error line of a command."""
    assert launch.main(given) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    return lines[0]


def test_a_student_trains_on_the_rows_of_a_file_without_any_stage_before_it(tmp_path):
    path = examples(tmp_path / "rows.jsonl")
    assert launch.main([*arguments(tmp_path / "runs", f"distill.examples={path}")]) == 0
    folder = tmp_path / "runs" / "distill"
    kept = jsonl.read(folder / fine_tuning.EXAMPLES)
    assert [(row["id"], row["prompt"], row["response"]) for row in kept] == [
        (f"row-{number}", row["prompt"], row["response"]) for number, row in enumerate(jsonl.read(path), 1)
    ]
    record = json.loads((folder / "DONE").read_text())
    assert set(record["inputs"]) == {"base", path} and len(record["inputs"][path]) == 64
    assert record["figures"]["examples"] == 64 and [row["update"] for row in read(folder)] == [1, 2, 3, 4]
    assert not (tmp_path / "runs" / "stage3_rejection_sft").exists()
    page = (folder / "report.html").read_text()
    assert "student_distilled" in page and "How many came through each filter" in page


def test_a_changed_file_makes_the_finished_run_stale(tmp_path, capsys):
    path = examples(tmp_path / "rows.jsonl", 32)
    given = arguments(tmp_path / "runs", f"distill.examples={path}", "evaluation.max_problems=4")
    assert launch.main(given) == 0
    capsys.readouterr()
    assert launch.main(given) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err
    examples(tmp_path / "rows.jsonl", 16)
    assert f"its input {path} has changed" in refused(given, capsys)


def test_a_prefilled_think_stands_in_the_samples_and_is_graded_with_them(tmp_path):
    path = examples(tmp_path / "rows.jsonl")
    assert launch.main([*arguments(tmp_path / "runs", f"distill.examples={path}", "data.think_prefill=true")]) == 0
    samples = jsonl.read(tmp_path / "runs" / "distill" / "samples.jsonl")
    assert all(row["text"].startswith("<think>\n") and row["text"].count("<think>") == 1 for row in samples)
    assert sum(row["parts"]["format"] for row in samples) >= len(samples) / 2


def test_a_students_folder_gives_shape_tokenizer_and_template_and_takes_no_evaluation(tmp_path):
    """A random Qwen2 of the size of a thimble, with a sentencepiece tokenizer, trained under a real preset's name."""
    base, rows = tmp_path / "base", examples(tmp_path / "rows.jsonl", 8)
    model = replace(
        configs.load("distill:qwen2_5_1_5b").model,
        **dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16),
        **dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True),
    )
    params = sharding.initialize(
        decoder.specs(model), rng.key(0, "test", "init"), "float32", sharding.make_mesh(MeshConfig())
    )
    hf_export.save(base, params, model, spoken(tmp_path), "bfloat16")
    given = [f"--config.model.checkpoint={base}", f"--config.distill.examples={rows}", f"--workdir={tmp_path}/runs"]
    given += ["--config.pack.row_tokens=512", "--config.sft.examples_per_update=4", "--config.data.think_prefill=true"]
    assert launch.main(["--config=distill:qwen2_5_1_5b", *given]) == 0
    source, target = tmp_path / "runs" / "distill", tmp_path / "student"
    figures = json.loads((source / "DONE").read_text())["figures"]
    assert figures["examples"] == 8 and "student_distilled" not in figures
    assert [row["update"] for row in read(source)] == [1, 2, 3, 4]
    assert launch.main(["--config=export_hf", f"--config.checkpoint={source}", f"--config.output={target}"]) == 0
    assert (target / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert hf_config.model_config(target) == model
    asked = tokenizer.from_folder(target).render_chat([{"role": "user", "content": "q"}])
    assert asked == templates.render("q", "r1_zero", think_prefill=True) and asked.endswith("Assistant:<think>\n")
    assert str(tmp_path) not in (target / "README.md").read_text()


def spoken(folder) -> tokenizer.Tokenizer:
    """Returns a sentencepiece tokenizer trained on the tiny world's corpus."""
    (folder / "words").mkdir()
    (folder / "words.txt").write_text("\n".join(corpus.documents(200, seed=1, drill_fraction=0.3)))
    options = dict(model_type="bpe", vocab_size=420, byte_fallback=True, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        input=f"{folder}/words.txt", model_prefix=f"{folder}/words/tokenizer", **options
    )
    return tokenizer.from_folder(folder / "words")


def test_only_the_response_and_the_end_are_trained():
    config, own = configs.load("distill"), tokenizer.tiny()
    row = solved(tasks.Linear(7, 5, 5))
    (item,) = sft_rows.items_of(row, config.stage, config.data, own)
    assert own.backend.decode(item.tokens.tolist()) == f"{row['prompt']} {row['response']} <eos>"
    asked = len(own.encode(row["prompt"]))
    assert item.loss_mask.tolist() == [0.0] * asked + [1.0] * (len(item.tokens) - asked)


@pytest.mark.parametrize("template", ["plain", "r1_zero"])
def test_a_prefilled_think_is_prompt_and_not_trained(template):
    config, own = (
        configs.load("distill", [("data.think_prefill", "true"), ("data.template", template)]),
        tokenizer.tiny(),
    )
    row = solved(tasks.Linear(7, 5, 5))
    (item,) = sft_rows.items_of(row, config.stage, config.data, own)
    trained = item.tokens[item.loss_mask > 0].tolist()
    assert own.backend.decode(trained) == f"{row['response'].removeprefix('<think> ')} <eos>"
    assert (item.tokens[item.loss_mask == 0][-1], trained.count(own.encode("<think>")[0])) == (
        own.encode("<think>")[0],
        0,
    )
    # Split differently, it is the same text.
    (plain,) = sft_rows.items_of(row, config.stage, replace(config.data, think_prefill=False), own)
    np.testing.assert_array_equal(item.tokens, plain.tokens)


def test_an_answer_without_a_thought_is_trained_after_a_prompt_that_opens_none():
    config, own = configs.load("distill", [("data.think_prefill", "true")]), tokenizer.tiny()
    row = {"prompt": "tell cat :", "response": "the cat is small thanks"}
    (item,) = sft_rows.items_of(row, config.stage, config.data, own)
    assert own.backend.decode(item.tokens.tolist()) == "tell cat : the cat is small thanks <eos>"


@pytest.mark.parametrize(
    ("turn", "prompt", "response"),
    [
        ("<think>\na\n</think>b", "q<think>\n", "a\n</think>b"),
        ("<think>a</think>b", "q<think>\n", "a</think>b"),
        (" <think> a </think> b", "q<think>\n", "a </think> b"),
        ("<think>\n\n</think>b", "q<think>\n", "\n</think>b"),
        ("b", "q", "b"),
    ],
)
def test_a_turn_is_split_where_the_prompt_ends(turn, prompt, response):
    assert templates.split_turn("q<think>\n", turn) == (prompt, response)
    assert templates.split_turn("q", turn) == ("q", turn)


def test_examples_longer_than_a_row_are_left_out_and_counted(capsys):
    config, own = configs.load("distill"), tokenizer.tiny()
    long = {"prompt": "tell cat :", "response": "cat " * 200}
    rows = [solved(tasks.Linear(7, 5, 5)), long]
    items = [item for row in rows for item in sft_rows.items_of(row, config.stage, config.data, own)]
    lengths = np.asarray([len(item.tokens) for item in items])
    assert fine_tuning.fitting(lengths, config.pack.row_tokens).tolist() == [0]
    assert "1 of 2 examples exceed 96 tokens (longest 204), left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"all 1 examples exceed config.pack.row_tokens=96 \(longest 204\); raise it"):
        fine_tuning.fitting(lengths[1:], config.pack.row_tokens)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ('{"prompt": "p"}\n', "line 1: field 'response' is missing"),
        ('{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": 3}\n', "line 2: field 'response' is int"),
        ('{"prompt": " ", "response": "r"}\n', "line 1 (row-1): field 'prompt' is empty"),
    ],
)
def test_a_bad_file_is_one_line_and_leaves_nothing(content, expected, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    line = refused(arguments(tmp_path / "runs", f"distill.examples={path}"), capsys)
    assert str(path) in line and expected in line
    assert not (tmp_path / "runs").exists()


def mixed(path, bad: bool = False) -> str:
    """Writes rows with and without a task, some wrong, and returns the path; `bad` makes two of them unreadable."""
    rows = [
        {"problem": f"{n}+1?", "answer": n + 1, "response": f"<think>x</think> \\boxed{{{n + 1 + (n % 4 == 1)}}}"}
        | ({"task": "math"} if n % 3 else {})
        | {"uuid": f"u{n}"}
        for n in range(20)
    ]
    rows[7] = {"prompt": "A poem?", "task": "general", "response": "Roses.", "uuid": "u7"}
    if bad:
        rows[11]["response"], rows[13]["task"] = " ", 3
    jsonl.write(path, rows)
    return str(path)


def read_whole(path: str, data: DataConfig, reward: RewardConfig) -> tuple[list, list[str]]:
    """Returns (drafts, notes) of a file whose rows are all read before the first becomes a draft."""
    table = files.read(path, data.columns)
    return [example_files.draft(row, path, reward, data.task) for row in table.rows], table.notes


def test_a_file_read_row_by_row_is_what_reading_it_whole_is(tmp_path):
    path, (data, reward) = mixed(tmp_path / "rows.jsonl"), (DataConfig(), RewardConfig())
    rows = example_files.ExampleFile(path, data, reward)
    drafts, notes = read_whole(path, data, reward)
    assert list(rows) == list(rows) == drafts and rows.count == 20
    (cause,) = turns.thoughts(draft.text for draft in drafts)
    assert rows.remarks == [
        *(f"{path}: {note}" for note in notes),
        f"{path}: 1 of 20 responses lack exactly one closed <think>...</think> ({cause}: 1)",
        f"{path}: 7 of 20 rows have no task: their responses are taken as they are; --config.data.task=TASK grades "
        "those with an answer",
    ]
    assert drafts[7].problem.id == "u7" and any("uuid read as id" in line for line in rows.remarks)


def test_a_bad_row_is_named_alike_whether_the_file_is_read_whole_or_row_by_row(tmp_path):
    path, lines = mixed(tmp_path / "rows.jsonl", bad=True), []
    for reader in (read_whole, example_files.ExampleFile):
        for task in (3, ""):  # a row that cannot be read comes first, then one that can be no draft
            rows = jsonl.read(path)
            rows[13]["task"] = task
            jsonl.write(path, rows)
            with pytest.raises(ValueError) as error:
                reader(path, DataConfig(), RewardConfig())
            lines.append(str(error.value))
    assert lines[:2] == lines[2:] and "line 14" in lines[0] and "line 12: field 'response' is empty" in lines[1]


def test_examples_graded_in_blocks_are_those_graded_at_once(tmp_path, monkeypatch, capsys):
    path, reward = mixed(tmp_path / "rows.jsonl"), RewardConfig()
    rows = example_files.ExampleFile(path, DataConfig(), reward)

    def examples_in_blocks(size: int) -> tuple:
        monkeypatch.setattr(distill, "BLOCK_ROWS", size)
        kept, counts = distill.of_file(rows, rows.count, "distill", reward, DistillConfig())
        capsys.readouterr()
        return list(kept), list(counts.items()), capsys.readouterr().err.splitlines()[-1]

    whole, in_blocks = examples_in_blocks(64), examples_in_blocks(3)
    assert whole == in_blocks
    assert dict(whole[1])["wrong"] == {"math": 4} and len(whole[0]) == 16


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\nnothing\n')
    rows = iter(files.FileRows(str(path)))
    assert next(rows).fields == {"id": "row-1", "prompt": "p", "response": "r"}
    with pytest.raises(ValueError, match="line 2: malformed JSON"):
        next(rows)


def test_examples_that_fail_on_the_way_leave_no_file(tmp_path):
    path = tmp_path / "examples.jsonl"
    with pytest.raises(ValueError, match="distill: no example passed the checks"):
        fine_tuning.write_examples(path, iter(()), {"kept": {}}, "distill")
    assert list(tmp_path.iterdir()) == []


def test_a_real_student_without_weights_names_the_field(tmp_path, capsys):
    path = examples(tmp_path / "rows.jsonl", 2)
    given = ["--config=distill:qwen2_5_1_5b", f"--config.distill.examples={path}", f"--workdir={tmp_path}/runs"]
    expected = "error: distill:qwen2_5_1_5b ships no base model; give the student's starting weights with "
    assert refused(given, capsys) == f"{expected}--config.model.checkpoint=DIR (a Hugging Face folder)"
    assert not (tmp_path / "runs").exists()


def test_a_real_student_without_examples_names_both_sources(tmp_path, capsys):
    given = ["--config=distill:qwen2_5_1_5b", f"--config.model.checkpoint={tmp_path}", f"--workdir={tmp_path}/runs"]
    line = refused(given, capsys)
    assert "stage3_rejection_sft is missing" in line and "--config.distill.examples=FILE.jsonl" in line


def test_a_real_model_without_problems_is_asked_for_them_and_a_student_is_not():
    real = configs.load("distill:qwen2_5_1_5b")
    assert not problems.has_problems(real.data)
    with pytest.raises(ValueError, match=r"--config\.data\.path=FILE\.jsonl"):
        problems.source(parts_of(parts.PromptParts, real))
    assert prompts.template(real.stage, real.data, tokenizer.tiny()) == "r1_zero"
