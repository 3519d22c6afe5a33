"""A report as CI systems read it: Markdown for a step's summary, JUnit for its gates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantcli.reporting.report import Report, Table
from quantcli.system.files import whole_file, write_text


def write_markdown(tables: Sequence[Table], report: Report, path: Path | None) -> None:
    """Write tables, gates and warnings to ``path``, and inside a GitHub step to its summary as well."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if path is None and not summary:
        return
    parts = [f"## quantcli {report.command}", "", *(table.to_markdown() for table in tables)]
    if report.warnings:
        parts += ["### Warnings", "", *(f"- {warning}" for warning in report.warnings), ""]
    text = "\n".join(parts)
    if path is not None:
        with whole_file(path) as unfinished:
            write_text(unfinished, text)
    if summary:
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(text)


def write_junit(report: Report, path: Path) -> None:
    """Write one test case per gate, for CI systems that show JUnit results.

    Raises:
        MissingExtraError: junitparser is not installed.
    """
    try:
        from junitparser import Failure, JUnitXml, TestCase, TestSuite
    except ImportError as error:
        from quantcli.errors import MissingExtraError

        raise MissingExtraError("junitparser", "report", "--junit") from error
    suite = TestSuite(f"quantcli {report.command}")
    for gate in report.gates:
        case = TestCase(gate.require, classname=gate.model)
        if not gate.passed:
            case.result = [Failure(f"{gate.require} does not hold: the value is {gate.value}")]
        suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    with whole_file(path) as unfinished:
        document.write(str(unfinished), pretty=True)
