"""Hooks of conftest.py: in CI, where all that the tests need is there, a skip is an error, but for
tests that need a GPU."""

from __future__ import annotations

import os

import pytest

unwanted_skips: list[str] = []


def note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if os.environ.get("CI") and not reason.startswith("needs a CUDA device"):
            unwanted_skips.append(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = pytest_collectreport = note_skip


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unwanted_skips:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if unwanted_skips:
        terminalreporter.section("skipped in CI: an error", red=True)
        terminalreporter.write("".join(f"{line}\n" for line in unwanted_skips))
