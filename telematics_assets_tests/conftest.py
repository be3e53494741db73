"""What every test stands on.

Belongs here: the `--soak` option, isolation from the developer's own environment, hypothesis profiles, and the rule
that nothing is skipped in CI.
Does not belong here: fixtures of one room (they stand in that room's folder).
"""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

#: How long the whole house is kept under kills by default, with `--soak` and without, seconds.
SOAK_SECONDS, SHORT_SOAK_SECONDS = 600.0, 6.0
#: How much longer loops over kills, races and random input run with `--soak`.
SOAK_FACTOR = 20
_OURS = ("TELEMATICS_", "DAGSTER_", "SUPABASE_", "PG", "SPARK_", "PYSPARK_")

pytest_plugins = (
    "telematics_assets_tests.cages",
    "telematics_assets_tests.databases",
    "telematics_assets_tests.sparks",
)

#: Examples of a property test that says no number of its own.
EXAMPLES = 20
hypothesis_settings.register_profile("local", deadline=None, max_examples=EXAMPLES)
hypothesis_settings.register_profile("ci", deadline=None, max_examples=EXAMPLES, derandomize=True, print_blob=True)
hypothesis_settings.register_profile("soak", deadline=None, max_examples=100 * EXAMPLES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run kill, race and property tests for much longer")
    parser.addoption("--spark", action="store_true", help="run the tests on Apache Spark, and no others")
    parser.addoption("--soak-seconds", type=float, help=f"length of the long soak; {SOAK_SECONDS:g} with --soak")


def pytest_configure(config: pytest.Config) -> None:
    # Also in every xdist worker, and inherited by every process that a test starts.
    for name in list(os.environ):
        if name.startswith(_OURS):
            del os.environ[name]
    hypothesis_settings.load_profile("soak" if config.getoption("soak") else "ci" if "CI" in os.environ else "local")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    spark = bool(config.getoption("spark"))
    elsewhere = [item for item in items if spark != (item.get_closest_marker("spark") is not None)]
    items[:] = [item for item in items if item not in set(elsewhere)]
    config.hook.pytest_deselected(items=elsewhere)
    if config.getoption("soak"):
        return
    for_soak = {item for item in items if item.get_closest_marker("soak")}
    alike = collections.defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item not in for_soak and item.get_closest_marker("sparingly"):
            alike[item.nodeid.partition("[")[0]].append(item)
    for number, group in enumerate(alike.values()):
        for_soak.update(set(group) - {group[number % len(group)]})
    items[:] = [item for item in items if item not in for_soak]
    config.hook.pytest_deselected(items=list(for_soak))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped_in_ci(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if reports := _skipped_in_ci(config):
        terminalreporter.section("skipped in CI, which is a failure", red=True)
        for report in reports:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.line(f"{report.nodeid}: {reason}")


def _skipped_in_ci(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if "CI" not in os.environ or reporter is None:
        return []
    # An expected failure is reported under another key.
    reports: list[pytest.TestReport] = reporter.stats.get("skipped", [])
    return reports


@pytest.fixture(scope="session")
def soak_factor(pytestconfig: pytest.Config) -> int:
    """By how much to multiply the rounds of a kill, race or stress loop."""
    return SOAK_FACTOR if pytestconfig.getoption("soak") else 1


@pytest.fixture(scope="session")
def soak_seconds(pytestconfig: pytest.Config) -> float:
    """How long to keep the whole house under kills."""
    chosen: float | None = pytestconfig.getoption("soak_seconds")
    return chosen or (SOAK_SECONDS if pytestconfig.getoption("soak") else SHORT_SOAK_SECONDS)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
