"""What is installed: a wheel and a source archive built from the checkout, and the wheel at work outside it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("r1jax", "configs", "kernels", "setup.py", "pyproject.toml", "README.md")


def run(*command: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**kept, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def expected_files() -> set[str]:
    """Returns the members the package must have: every module and asset of the three folders."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "r1jax").rglob("*.py")}
    found |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "r1jax" / "assets").glob("*") if path.is_file()}
    for folder in ("configs", "kernels"):
        found |= {f"r1jax/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Returns the wheel that was built from the source archive of a copy of the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in filter(lambda name: (ROOT / name).exists(), SOURCES):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    run(sys.executable, "setup.py", "--quiet", "sdist", cwd=tree)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tree / "unpacked", filter="data")
    (unpacked,) = (tree / "unpacked").iterdir()
    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=unpacked)
    (built,) = (unpacked / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_whole_package_and_nothing_at_top_level(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected_files()


def test_wheel_runs_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = (sys.executable, "-P", "-m", "r1jax.launch", "--config=r1_zero", "--dry_run")
    installed = run(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    checkout = run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert installed.stdout == checkout.stdout and installed.stdout.startswith("stage = 'r1_zero'\n")


def test_checkout_runs_uninstalled_and_its_folders_shadow_no_package(tmp_path):
    program = (
        "import r1jax.configs.grade, r1jax.launch, importlib.util as u\n"
        "specs = [u.find_spec(name) for name in ('kernels', 'configs', 'launch', 'tests')]\n"
        "print([getattr(spec, 'origin', None) for spec in specs], r1jax.launch.__file__, r1jax.configs.grade.__file__)"
    )
    done = run(sys.executable, "-P", "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    files = f"{ROOT / 'r1jax' / 'launch.py'} {ROOT / 'configs' / 'grade.py'}"
    assert done.stdout == f"[None, None, None, None] {files}\n"


@pytest.mark.parametrize("folder", ["kernels", "configs", "launch", "tests"])
def test_folder_beside_the_package_has_no_init(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_folder_is_named_like_a_package_of_jetstream():
    assert not (ROOT / "benchmarks").exists() and not (ROOT / "jetstream").exists()


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh", "launch/venv.sh", ".ci/run"])
def test_shell_script_parses(script):
    assert run("bash", "-n", str(ROOT / script), cwd=ROOT).stderr == ""


@pytest.mark.parametrize(
    ("skips", "listed", "code"),
    [
        ([], "", 0),
        (["test_a::test_x"], "# why\ntest_a::test_x\n", 0),
        (["test_a::test_x"], "", 1),
        (["test_a::test_x", "test_a::test_y"], "test_a::test_x\n", 1),
        (["test_a::test_y"], "test_a::test_x\n", 1),
        ([], "test_a::test_x\n", 0),
        (["test_sandbox::test_x"], "test_sandbox::test_x\n", 1),
        (["test_a::test_jetstream_serves"], "test_a::test_jetstream_serves\n", 1),
    ],
)
def test_ci_accepts_the_listed_skips_only(tmp_path, skips, listed, code):
    cases = "".join(
        '<testcase classname="{}" name="{}"><skipped message="why"/></testcase>'.format(*skip.split("::"))
        for skip in skips
    )
    junit, expected = tmp_path / "junit.xml", tmp_path / "expected"
    junit.write_text(f'<testsuites><testsuite><testcase classname="t" name="n"/>{cases}</testsuite></testsuites>')
    expected.write_text(listed)
    command = [sys.executable, str(ROOT / ".ci" / "check_skips.py"), str(junit), str(expected)]
    assert subprocess.run(command, capture_output=True).returncode == code
