"""The boundaries of the house: who may know whom, what every room says of itself, what is shipped.

Belongs here: rules that hold for every file, read from the source text.
Does not belong here: what any room does.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement

from telematics_assets.assets.files import LoadConfig
from telematics_assets.assets.supabase import ReplicateConfig
from telematics_assets.catalog import FileStreamOptions, SchemaEvolutionMode
from telematics_assets.cli import app
from telematics_assets.engines.base import FILE_STATES
from telematics_assets.settings import VARIABLES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "telematics_assets"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FILES_PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
PURE_ROOMS = (
    "autoloader",
    "catalog",
    "deployment",
    "engines",
    "errors",
    "lakehouse",
    "microbatch",
    "processes",
    "remote",
    "remote_faults",
    "settings",
    "staging",
    "volumes",
)

each_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def kept_files(folder: Path) -> Iterator[Path]:
    """Every file that belongs to the project: what .gitignore doesn't name."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", *(line.rstrip("/") for line in lines if line and not line.startswith("#"))]
    for path in folder.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in ignored):
            continue
        if path.is_dir():
            yield from kept_files(path)
        else:
            yield path


@each_module
def test_a_module_says_what_belongs_in_it_and_what_does_not(module: Path) -> None:
    docstring = ast.get_docstring(parse(module))
    assert docstring, f"{module} has no docstring"
    if module.name != "__init__.py":
        flat = " ".join(docstring.split())
        assert "Belongs here:" in flat
        assert "Does not belong here:" in flat


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if room(module) in PURE_ROOMS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_pure_room_knows_neither_dagster_nor_the_rooms_that_do(module: Path) -> None:
    impure = {room(other) for other in MODULES} - {*PURE_ROOMS, "__init__"}
    for name in imports(parse(module)):
        top, _, rest = name.partition(".")
        assert top != "dagster"
        assert not top.startswith("dagster_")
        assert top != "telematics_assets" or rest.split(".")[0] not in impure, name


@each_module
def test_only_settings_reads_the_environment(module: Path) -> None:
    if module == PACKAGE / "settings.py":
        return
    for node in ast.walk(parse(module)):
        read = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
        assert read not in {"environ", "environb", "getenv", "getenvb"}, f"{module}: use telematics_assets.settings"


@each_module
def test_an_engine_knows_no_other_engine(module: Path) -> None:
    shared = ("base", "checkpointed")
    if room(module) != "engines" or module.stem in shared:
        return
    for name in imports(parse(module)):
        if name.startswith("telematics_assets.engines."):
            assert name.split(".")[2] in (*shared, module.relative_to(PACKAGE / "engines").parts[0].removesuffix(".py"))


@each_module
def test_nobody_is_told_to_look_away(module: Path) -> None:
    """A rule that is switched off for a whole file holds nowhere in it."""
    text = module.read_text(encoding="utf-8")
    assert not re.search(r"^\s*# (ruff: noqa|mypy: ignore-errors|type: ignore)", text, re.MULTILINE)
    assert not re.search(r"# noqa(?!: [A-Z]+\d+)|# type: ignore(?!\[)", text), "name the rule"


def test_definitions_load_without_the_heavy_libraries() -> None:
    """Dagster loads the definitions in every process that it starts."""
    code = (
        "import sys, dagster; before = set(sys.modules); import telematics_assets.definitions; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"adbc_driver_postgresql", "deltalake", "matplotlib", "numpy", "polars", "psycopg", "pyarrow", "pyspark"}
    assert not heavy.intersection(loaded.stdout.split())


def test_the_base_install_needs_no_jvm_and_no_databricks_sdk() -> None:
    wanted, seen = ["telematics_assets"], set[str]()
    while wanted:
        name = wanted.pop()
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            # No extra is asked for here, so a marker that asks for one is never true.
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            known = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if needed and known not in seen:
                seen.add(known)
                wanted.append(requirement.name)
    assert "dagster" in seen
    forbidden = {"databricks-connect", "databricks-sdk", "delta-spark", "matplotlib", "psycopg", "py4j", "pyspark"}
    assert not seen & forbidden


def test_the_extras_are_those_that_messages_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {"plots", "spark", "databricks", "supabase", "postgres", "objects", "urls", "dev"} == set(extras)
    for module in MODULES:
        for named in re.findall(r'telematics_assets\[(\w+)\]"', module.read_text(encoding="utf-8")):
            assert named in extras, module


def test_everything_that_make_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {re.sub(r"[-_.]+", "-", pin.name).lower(): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["plots"], *extras["dev"], *extras["spark"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[requirement.name.lower()]), text


def test_the_example_environment_lists_every_setting_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    assignments = [line for line in lines if line and not line.startswith("#")]
    assert assignments == [f"{name}={default}" for name, (default, _) in VARIABLES.items()]
    for name, (default, purpose) in VARIABLES.items():
        assert lines[lines.index(f"{name}={default}") - 1] == f"# {purpose}"


def test_the_readme_explains_every_setting_and_every_make_target() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in [*VARIABLES, "DAGSTER_HOME"] if name not in readme] == []
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [target for target in targets if f"make {target}" not in readme] == []


def test_every_link_between_the_pages_leads_to_a_heading() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            found = (page.parent / target).resolve() if target else page
            assert found.is_file(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page}: {target}#{anchor}"


def test_the_pages_explain_every_option() -> None:
    options = [field.name for field in fields(FileStreamOptions)]
    tables = [line.split(" | ")[0] for line in FILES_PAGE.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(tables))) == sorted(options)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [option for option in options if f"`{option}`" not in readme] == []
    modes = get_args(SchemaEvolutionMode)
    assert [mode for mode in modes if f"`{mode}`" not in FILES_PAGE] == []


def test_the_pages_name_every_command_run_config_and_file_state() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = [
        command.name or getattr(command.callback, "__name__", "")
        for command in app.registered_commands
        if not command.hidden
    ]
    assert [command for command in commands if not re.search(rf"(telematics|make) {command}\b", pages)] == []
    fields = [*LoadConfig.model_fields, *ReplicateConfig.model_fields]
    assert [name for name in fields if f"`{name}`" not in pages] == []
    assert [state for state in FILE_STATES if f"| `{state}` |" not in pages] == []


def test_no_file_names_a_machine_or_a_package_index(repository: Path) -> None:
    told = re.compile(
        rb"(?<![\w.])/(?:home|Users|root)/\w"
        rb"|--(?:extra-)?index-url|--find-link[s]|--trusted-hos[t]"
        rb"|https?://[^\s\"')]*(?:/simple\b|/maven2\b|\.whl\b|\.tar\.gz\b|\.jar\b)"
        rb"|" + re.escape(bytes(repository)) + rb"\b"
    )
    files = list(kept_files(repository))
    assert {repository / name for name in ("pyproject.toml", "constraints.txt", "Makefile")} <= set(files)
    for file in files:
        found = told.search(file.read_bytes())
        assert found is None, f"{file}: {found[0]!r}"


def test_a_wheel_ships_the_package_alone(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for name in ("telematics_assets", "telematics_assets_tests"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(pip, cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    expected = {str(path.relative_to(repository)) for path in MODULES}
    catalogs = PACKAGE / "engines" / "spark"
    data = {catalogs / "telematics-catalogs.jar", *(catalogs / "jvm").rglob("*.java")}
    expected |= {str(path.relative_to(repository)) for path in data}
    assert shipped == expected | {"telematics_assets/py.typed", "telematics_assets/dagster.yaml"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
