"""Reading what `potstill doctor` found."""

from __future__ import annotations

from collections.abc import Sequence

from potstill.clients.doctor.findings import Finding
from potstill.clients.doctor.teacher_checks import Probing

PROBING = Probing(row_tokens=12)


def levels(findings: Sequence[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def failed(findings: Sequence[Finding]) -> Finding:
    """The only one that fails; it says what to do."""
    [finding] = [finding for finding in findings if finding.level == "fail"]
    assert finding.way_out
    assert "\n" not in finding.detail
    return finding
