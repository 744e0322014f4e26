"""Refuse a commit whose subject breaks the rule of CONTRIBUTING.md.

Run: python .github/commit_subject.py FILE      the message's file, as a commit-msg hook gets it
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LIMIT = 72
GENERATED = re.compile(r"(Merge|Revert) |(fixup|squash)! ")


def fault(message: str) -> str | None:
    """One sentence on what is wrong with a commit message, or None."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if GENERATED.match(subject):
        return None
    if len(subject) > LIMIT:
        return f"the subject has {len(subject)} characters; it must have at most {LIMIT}"
    if not re.match(r"[a-z][\w/,-]*: [a-z]", subject):
        return f"the subject is {subject!r}; it must read `area: verb …`"
    if len(lines) > 1 and lines[1].strip():
        return "the second line must be empty; the body begins on the third"
    return None


if __name__ == "__main__":
    found = fault(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if found:
        sys.exit(f"commit message: {found}")
