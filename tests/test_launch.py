"""The command line: dry runs, one-line errors with exit code 2, figures as JSON, and sweeps in processes of their own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from r1jax import config, flags, launch, stage_table, sweep
from r1jax.core import observe

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = ("r1_zero", "stage0_base", "stage1_coldstart", "evaluate", "grade")


ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def python(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, env=ENV)


def open_when_read(pipe: pathlib.Path) -> int:
    """Returns a descriptor for writing once another process has the pipe open for reading; waits up to a minute."""
    for _ in range(1200):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing opened {pipe}")


def rows_file(path: pathlib.Path, response: str) -> pathlib.Path:
    row = {"id": "1", "task": "math", "reference": "4", "response": response}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def test_dry_run_prints_every_field_and_writes_nothing(capsys, tmp_path):
    code = launch.main(["--config=r1_zero", "--config.seed=7", "--dry_run", f"--workdir={tmp_path / 'runs'}"])
    assert code == 0
    assert capsys.readouterr().out == config.dump(config.load("r1_zero", [("seed", "7")]))
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_the_fields_as_json_when_asked(tmp_path):
    path = tmp_path / "fields.json"
    assert launch.main(["--config=grade", "--dry_run", f"--json={path}"]) == 0
    assert json.loads(path.read_text())["optimizer.learning_rate"] == config.load("grade").optimizer.learning_rate


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--helpfull"]])
def test_help_lists_every_config_with_its_first_line(capsys, arguments):
    assert launch.main(arguments) == 0
    text = capsys.readouterr().out
    for entry in config.entries():
        assert f"{entry.summary} [{', '.join(entry.presets)}]" in text


def test_overrides_are_taken_in_any_order_and_form():
    forms = [
        ["--config=r1_zero", "--config.seed=3", "--config.rebuild_base=true"],
        ["--config.rebuild_base", "--config.seed", "3", "--config=r1_zero"],
        ["--config.seed", "3", "--config", "r1_zero", "--config.rebuild_base", "true"],
        ["-config.seed=3", "--config.rebuild_base", "--config=r1_zero", "--workdir=runs"],
    ]
    loaded = {config.load(parsed.spec, parsed.overrides) for parsed in map(flags.parse, forms)}
    assert loaded == {config.load("r1_zero", [("seed", "3"), ("rebuild_base", "true")])}


def test_a_negative_number_may_follow_its_field():
    assert flags.parse(["--config.seed", "-1"]).overrides == (("seed", "-1"),)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--explain"], ""),
        (["--explain", "--config.seed=1"], ""),
        (["-explain", "--json=a.json"], ""),
        (["--explain=row 7"], "row 7"),
        (["--explain", "row-7"], "row-7"),
        (["--explain=-7"], "-7"),
        ([], None),
    ],
)
def test_explain_takes_an_id_or_stands_alone(arguments, value):
    parsed = flags.parse(["--config=grade", *arguments])
    assert config.load(parsed.spec, parsed.overrides).explain == value


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sweeep=seed=1"], "unknown flag --sweeep; did you mean '--sweep'?"),
        (["seed=1"], "unexpected argument 'seed=1'; every argument is a --flag=value"),
        (["--config=grade", "--config.seed"], "--config.seed needs a value: --config.seed=VALUE"),
        (["--config=grade", "--config.sed"], "Config has no field 'sed' (in config.sed); did you mean 'seed'?"),
        (["--config=grade", "--sweep_index=0"], "--sweep_index=0 needs at least one --sweep=FIELD=v1,v2"),
        (["--config=bench_grading", "--explain=a"], "--explain goes with --config=grade alone"),
        *(
            (
                ["--config=r1_zero", f"--profile={text}"],
                f"--profile={text}: needs START:STOP with 1 <= START < STOP, as --profile=3:5 for a trace of updates 3 "
                "and 4",
            )
            for text in ("", "3", "3:", "0:2", "4:4", "5:4", "a:b", "1:2:3", "-1:2")
        ),
        (["--config=grade", "--profile=3:5"], "--profile measures updates, and grade makes none; leave it out"),
        (
            ["--config=evaluate", "--peak_tflops=9"],
            "--peak_tflops measures updates, and evaluate makes none; leave it out",
        ),
        (["--config=grade", "--json=."], "--json=. is a folder; give a file"),
        (
            ["--config=grade", "--workdir=setup.py/runs"],
            f"--workdir=setup.py/runs: {ROOT / 'setup.py'} is a file; give a path in a folder",
        ),
        (["--config=grade", "--workdir="], "--workdir= is empty; give a path"),
        (
            ["--config=grade", "--sweep=data.max_rows=0,1", "--sweep_index=2"],
            "--sweep_index=2: the sweep has 2 points, 0 to 1",
        ),
    ],
)
def test_bad_command_line_is_one_exact_line_and_exit_code_2(capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(ROOT)
    assert launch.main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {expected}\n")


def test_bad_integer_flag_is_one_line(capsys):
    assert launch.main(["--config=grade", "--sweep=data.max_rows=0", "--sweep_index=x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--sweep_index=x" in error


def test_process_reports_a_user_error_in_one_line_and_exits_2(tmp_path):
    done = python("-m", "r1jax.launch", "--config=r1_zer", cwd=tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).startswith("error: no config named 'r1_zer'; did you mean 'r1_zero'?; known: ")
    assert (done.stdout + done.stderr).count("\n") == 1


def test_debug_adds_the_traceback(capsys):
    assert launch.main(["--config=r1_zer", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1].startswith("error: no config named")


def test_command_line_and_configs_load_without_jax():
    program = (
        "import sys; from r1jax import config, flags, launch\n"
        "[config.load(entry.name) for entry in config.entries()]; flags.help_text()\n"
        "print(sorted({'jax', 'flax', 'numpy', 'torch'} & set(sys.modules)))"
    )
    assert python("-c", program).stdout == "[]\n"


@pytest.mark.parametrize("name", STAGES)
def test_launch_script_equals_the_module(name, tmp_path):
    script = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), "--dry_run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (script.returncode, script.stdout) == (0, config.dump(config.load(name)))


def test_what_is_measured_is_asked_for_before_the_stage_runs_and_is_no_part_of_its_config(
    monkeypatch, tmp_path, capsys
):
    asked, configs = [], []
    monkeypatch.setattr(observe, "ask", asked.append)
    monkeypatch.setattr(stage_table, "function", lambda stage: lambda resolved, workdir: configs.append(resolved) or {})
    common = ["--config=distill", f"--workdir={tmp_path}"]
    assert launch.main([*common, "--profile=3:5", "--peak_tflops=918"]) == launch.main(common) == 0
    assert asked == [observe.MeasurementRequest((3, 5), 918.0), observe.MeasurementRequest()]
    assert configs[0] == configs[1]


def test_points_of_a_sweep_measure_what_the_sweep_was_asked_to(tmp_path):
    arguments = flags.parse(["--config=r1_zero", "--sweep=seed=0,1", "--profile=3:5", "--peak_tflops=918"])
    (point, _) = config.sweep(config.load("r1_zero"), arguments.sweep, ())
    command = sweep._command(point, arguments, tmp_path, tmp_path / "figures.json")
    again = flags.parse(command[3:])
    assert (again.profile, again.peak_tflops) == ((3, 5), 918.0)


def test_sweep_script_needs_a_sweep(tmp_path):
    done = python(str(ROOT / "launch" / "sweep.py"), "--config=grade", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_unknown_stage_is_a_value_error():
    for name in ("no_such_stage", "", "../grade"):
        with pytest.raises(ValueError, match="no stage named"):
            stage_table.function(name)


def test_stage_figures_are_written_as_json(tmp_path):
    rows, out, figures = rows_file(tmp_path / "rows.jsonl", "4"), tmp_path / "out.jsonl", tmp_path / "figures.json"
    done = python(
        *("-m", "r1jax.launch", "--config=grade", f"--json={figures}", f"--workdir={tmp_path / 'runs'}"),
        *(f"--config.data.path={rows}", f"--config.output={out}"),
    )
    lines = [
        "references: 1 of 1 can be graded (100.00%)",
        "references by type: number 1",
        "golds graded as answers: 1 of 1 score 1",
    ]
    assert (done.returncode, done.stderr.splitlines()) == (0, lines)
    written = json.loads(figures.read_text())
    assert (written["rows"], written["mean"], written["scorable"]) == (1, 1.0, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ["rows.jsonl"]),
        ("", ["rows.jsonl"]),
        ('{"id": "1", "task": "math", "reference": "4", "response": "4"}\n{"id": \n', ["rows.jsonl", "2"]),
        ('{"id": "1", "task": "math", "reference": "4"}\n', ["rows.jsonl", "1", "response"]),
    ],
    ids=["missing file", "empty file", "malformed line", "missing field"],
)
def test_bad_data_is_one_line_with_file_and_line_and_leaves_nothing(capsys, tmp_path, text, expected):
    rows, out, figures = tmp_path / "rows.jsonl", tmp_path / "out.jsonl", tmp_path / "figures.json"
    if text is not None:
        rows.write_text(text, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    arguments = ["--config=grade", f"--config.data.path={rows}", f"--config.output={out}", f"--json={figures}"]
    assert launch.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert all(part in captured.err.replace(str(tmp_path), "") for part in expected)
    assert sorted(tmp_path.iterdir()) == before


def test_interrupt_ends_with_exit_code_130_and_one_line(tmp_path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    command = ["-m", "r1jax.launch", "--config=grade", f"--config.data.path={pipe}", "--config.output=out.jsonl"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores SIGINT
    )
    writer = open_when_read(pipe)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, output) == (130, "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_sweep_runs_every_point_survives_a_failed_one_and_skips_finished_ones(tmp_path):
    good = [rows_file(tmp_path / f"{name}.jsonl", response) for name, response in (("a", "4"), ("b", "5"), ("d", "4"))]
    bad = tmp_path / "c.jsonl"
    paths = ",".join(map(str, [good[0], good[1], bad, good[2]]))
    command = [
        *("-m", "r1jax.launch", "--config=grade", f"--config.output={tmp_path / 'out.jsonl'}"),
        *(f"--sweep=data.path={paths}", f"--workdir={tmp_path / 'runs'}"),
    ]
    first = python(*command)
    table = json.loads((tmp_path / "runs" / "sweep" / "table.json").read_text())
    assert first.returncode == 1
    assert [row["status"] for row in table] == ["done", "done", "failed", "done"]
    assert [row["exit_code"] for row in table] == [0, 0, 2, 0]
    assert [row["figures"].get("mean") for row in table] == [1.0, 0.0, None, 1.0]
    assert table[2]["error"].startswith("error: ") and "c.jsonl" in table[2]["error"]
    assert first.stdout.count("sweep of 4 points") == 1 and "failed (exit 2)" in first.stdout
    folders = sorted((tmp_path / "runs" / "sweep").glob("path=*"))
    assert len(folders) == 4 and [(folder / "DONE").exists() for folder in folders] == [True, True, False, True]

    rows_file(bad, "4")
    again = python(*command)
    table = json.loads((tmp_path / "runs" / "sweep" / "table.json").read_text())
    assert again.returncode == 0
    assert [row["status"] for row in table] == ["skipped", "skipped", "done", "skipped"]
    assert [row["figures"]["mean"] for row in table] == [1.0, 0.0, 1.0, 1.0]


def test_sweep_point_of_another_config_is_run_again(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", "4")
    command = [f"--config.data.path={rows}", f"--config.output={tmp_path / 'out.jsonl'}", "--sweep=data.max_rows=0,1"]
    command += ["-m", "r1jax.launch", "--config=grade", "--sweep_index=1", f"--workdir={tmp_path / 'runs'}"]
    statuses = []
    for change in ([], [], ["--config.reward.extraction=whole"]):
        path = tmp_path / f"{len(statuses)}.json"
        assert python(*command[3:5], *command[:3], *command[5:], *change, f"--json={path}").returncode == 0
        statuses += [(row["point"], row["status"]) for row in json.loads(path.read_text())]
    assert statuses == [("max_rows=1", "done"), ("max_rows=1", "skipped"), ("max_rows=1", "done")]
    assert [path.name for path in (tmp_path / "runs" / "sweep").iterdir()] == ["max_rows=1"]


def test_bad_sweep_value_stops_everything_before_the_first_point(capsys, tmp_path):
    arguments = ["--config=grade", "--sweep=data.max_rows=0,x", f"--workdir={tmp_path / 'runs'}"]
    assert launch.main(arguments) == 2
    assert capsys.readouterr().err == "error: config.data.max_rows=x: expected int\n"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_sweep_names_its_points(capsys, tmp_path):
    arguments = ["--config=grade", "--sweep=data.max_rows=0,1", "--dry_run", f"--workdir={tmp_path / 'runs'}"]
    assert launch.main(arguments) == 0
    assert capsys.readouterr().out.endswith("point 0: max_rows=0\npoint 1: max_rows=1\n")
    assert list(tmp_path.iterdir()) == []


def test_an_installed_tpu_compiler_is_no_noise_where_there_is_no_tpu():
    if any(pathlib.Path("/dev").glob("accel*")) or any(pathlib.Path("/dev/vfio").glob("*")):
        pytest.skip("this machine has a TPU")
    pytest.importorskip("libtpu")
    program = "from r1jax.core import runtime\nruntime.setup()\nimport jax\nprint(jax.default_backend())"
    environment = {name: value for name, value in ENV.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TPU" not in done.stderr and "InitGoogle" not in done.stderr
