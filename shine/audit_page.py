"""Audits of hard negatives on one HTML page that needs nothing beside it, and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shine.audit_tables import Audit, audit_examples, audit_notes, audit_tables, labels
from shine.errors import InputError
from shine.files import write_whole
from shine.pages import environment, marked


def write_audit(audits: Sequence[Audit], out: Path) -> Path:
    """`out` holds `audit.html` and `audit.json`; the path of the page comes back.

    Equal audits give equal files.

    Args:
        audits: of one or more files, as `shine.language.audit.audit` returns them.
        out: a folder; it is made.

    Raises:
        InputError: the folder cannot be written.
    """
    names = labels(audits)
    page = (
        environment()
        .get_template("audit.html.j2")
        .render(
            names=names,
            tables=audit_tables(audits),
            notes=audit_notes(audits),
            examples=[(name, _examples(audit)) for name, audit in zip(names, audits, strict=True)],
        )
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        document = {"audits": list(audits)}
        write_whole(out / "audit.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        write_whole(out / "audit.html", page)
    except OSError as error:
        raise InputError(f"cannot write the audit to {out}: {error.strerror}") from None
    return out / "audit.html"


def _examples(audit: Audit) -> list[dict[str, Any]]:
    """The examples of each defect with their altered words marked."""
    return [
        {
            "defect": text,
            "found": [{**one, "words": marked(one["query"], one["negative"])} for one in examples],
        }
        for text, examples in audit_examples(audit)
    ]
