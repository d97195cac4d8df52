"""The project itself is under test: directions of imports, nothing on import, names, locks, README."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "monitoring", "bridge", "deploy", "benchmarks")
MAY_IMPORT = {
    "monitoring": set(),
    "tasks": {"monitoring"},
    "flows": {"tasks", "monitoring"},
    "bridge": set(),
    "deploy": {"flows", "tasks", "monitoring", "bridge"},
    "benchmarks": {"flows", "tasks", "monitoring", "deploy"},
}
FOR_THE_SERVER = (
    "tasks.images",
    "tasks.decision",
    "tasks.inference",
    "tasks.routing",
    "tasks.sealed",
    "monitoring.capture",
)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def python(code: str, interpreter: Path | str = sys.executable, **environment: str) -> str:
    done = subprocess.run(
        [str(interpreter), "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in modules(package):
        ours = {name.split(".")[0] for name in imported(path)} & set(PACKAGES) - {package}
        assert ours <= MAY_IMPORT[package], f"{name_of(path)} imports {sorted(ours - MAY_IMPORT[package])}"


def test_only_flows_bridge_and_deploy_read_the_environment():
    for package in ("tasks", "monitoring"):
        for path in modules(package):
            assert not re.search(r"os\.environ|os\.getenv|BaseSettings", path.read_text()), name_of(path)


def test_nobody_outside_deploy_imports_a_flow_module():
    for package in ("tasks", "monitoring", "bridge"):
        for path in modules(package):
            assert not {name for name in imported(path) if name.split(".")[0] == "flows"}, name_of(path)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("bridge", "torch, mlflow, flows, tasks, monitoring"),
        ("monitoring", "torch, prefect, mlflow, flows, tasks"),
        ("tasks", ""),
        ("flows", "torch, mlflow, lance, evidently, onnx"),  # a flow run starts with its imports: keep them light
        ("deploy", "torch, lance, evidently"),
        ("benchmarks", "torch"),
    ],
)
def test_importing_does_nothing_but_define(package, forbidden, tmp_path):
    """In a clean process: no thread, no child, no file, no open socket, none of the heavy libraries of other rooms."""
    names = [name_of(path) for path in modules(package) if path.name != "__main__.py"]
    found = python(
        f"""
import importlib, sys, threading, psutil
me = psutil.Process()
threads = threading.active_count()
for name in {names!r}:
    importlib.import_module(name)
assert threading.active_count() == threads, threading.enumerate()
assert not me.children(), me.children()
assert not me.net_connections(), me.net_connections()
print([name for name in {forbidden.replace(" ", "").split(",")!r} if name in sys.modules])
""",
        HOME=str(tmp_path),
        TMPDIR=str(tmp_path),
        PREFECT_HOME=str(tmp_path / "prefect"),
    )
    assert found.strip().splitlines()[-1] == "[]"
    left = [path for path in tmp_path.rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert left == []


def test_the_server_environment_can_import_what_it_shares_with_the_flows():
    python("\n".join(f"import {name}" for name in FOR_THE_SERVER), ROOT / ".venv-triton/bin/python")


def test_import_triton_never_resolves_into_the_repository():
    code = """
import tasks
try:
    import triton
except ImportError:
    print("absent")
else:
    print(triton.__file__)
"""
    with_compiler = python(code).strip()
    assert with_compiler != "absent" and not Path(with_compiler).is_relative_to(ROOT / "triton")
    assert python(code, ROOT / ".venv-triton/bin/python").strip() == "absent"


def test_no_file_hides_a_library():
    for forbidden in ("triton/__init__.py", "triton.py", "tests/__init__.py", "tests/tasks"):
        assert not (ROOT / forbidden).exists(), forbidden
    assert {path.stem for path in modules("flows")}.isdisjoint(
        {"prefect", "mlflow", "torch", "onnx", "triton", "evidently"}
    )


def test_every_package_is_listed_for_installation():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {path.parent.name for path in ROOT.glob("*/__init__.py")}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-photographs.lock", "triton/requirements.lock"])
def test_locks_pin_and_hash_everything_and_name_no_index(lock):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    entries = re.findall(r"^([a-zA-Z0-9._-]+(?:\[[^\]]*\])?)(==\S+)?", text, re.MULTILINE)
    assert len(entries) > 0
    assert [name for name, pin in entries if not pin] == []
    assert text.count("--hash=sha256:") >= len(entries)


def test_both_environments_pin_the_same_codecs_and_runtimes():
    def pins(lock: str) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))

    flows, server = pins("requirements.lock"), pins("triton/requirements.lock")
    for package in ("simplejpeg", "opencv-python-headless", "pillow", "onnxruntime", "openvino"):
        assert flows[package] == server[package]
    assert server["numpy"].startswith("1.")


def test_no_module_has_grown_beyond_a_room():
    long = {
        name_of(p): n for package in PACKAGES for p in modules(package) if (n := len(p.read_text().splitlines())) > 350
    }
    assert long == {}


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_readme_names_every_source_file():
    text = readme()
    for package in (*PACKAGES, "triton"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                assert path.name in text, f"{path.relative_to(ROOT)} is not in the README's tree"


def test_the_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"`?make ([a-z-]+)", readme()))
    assert {"demo", "test"} <= used <= targets


def test_the_tirewatch_commands_of_the_readme_exist():
    from typer.main import get_command

    from deploy.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(
        re.findall(
            r"\btirewatch ([a-z-]+)\b", "\n".join(re.findall(r"```\w*\n(.*?)```|`(tirewatch [^`]*)`", readme())[0])
        )
    )
    used |= set(re.findall(r"`tirewatch ([a-z-]+)", readme()))
    assert used <= known, used - known


def test_the_docs_name_every_deployment_and_every_setting():
    from flows.settings import Settings

    docs = readme() + "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        flow = deployment["entrypoint"].rsplit(".", 1)[-1]
        assert f"{flow}/{deployment['name']}" in docs or f"{flow}/<recipe>" in docs, deployment["name"]
    for field in Settings.model_fields:
        assert f"TIREWATCH_{field.upper()}" in docs, f"TIREWATCH_{field.upper()} is documented nowhere"
