"""The last step of a conversion to GGUF: what was made of the model becomes one file, which is read again and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.gguf.settings import window_warning
from quantcli.conversion.checkpoint import llama_cpp
from quantcli.conversion.checkpoint.gguf_file import plan_gguf
from quantcli.conversion.checkpoint.layout import Layout
from quantcli.conversion.staging import Staging
from quantcli.core.manifest import Manifest
from quantcli.planning.plan import Plan


class Packing:
    """A GGUF file under way.

    Raises:
        UsageError, InputError: what `plan_gguf` refuses.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, output: Path, verify: str | None, limit: int | None) -> None:
        self._file = plan_gguf(plan, checkpoint, output)
        self._skip = llama_cpp.reason_to_skip(self._file, verify, limit)
        self._path = output
        warning = window_warning(self._file.architecture, checkpoint.config or {})
        if warning:
            checkpoint.warnings += (warning,)

    @property
    def name(self) -> str:
        """Of the file."""
        return self._file.name

    @property
    def nbytes(self) -> int:
        """About what the file will take."""
        return self._file.nbytes

    @property
    def planned(self) -> dict[str, Any]:
        """What will be run, for the report of a plan."""
        return llama_cpp.planned(self._skip)

    def as_reported(self, layout: Layout) -> Layout:
        """The layout with what tensors will take in the file."""
        return self._file.as_reported(layout)

    def run(self, staging: Staging, layout: Layout, details: dict[str, Any]) -> Layout:
        """Put the file in the place of what a conversion has written, and prove it.

        Args:
            staging: whose output is a folder with codes, scales and values, and is the file in the end.
            layout: of that folder.
            details: of the report, whose ``verified`` and ``manifest`` tell of the file in the end.

        Returns:
            The layout to report.

        Raises:
            VerificationError, InputError, NotProvenError: the file is not what was meant, or llama.cpp does not run it.
        """
        written, path = staging.set_aside(), staging.out / self.name
        manifest = Manifest.of(details["manifest"], self._path)
        self._file.write(path, written, manifest)
        verified = dict(manifest.verified or {}) | {"file": self._file.check(path, written)}
        folder = self._file.folder
        verified["runtime"] = (
            llama_cpp.skipped(*self._skip)
            if self._skip
            else llama_cpp.prove(path, folder, codes=any(layer.has_codes for layer in self._file.plan.layers))
        )
        manifest.verified = verified
        self._file.finish(path, manifest)
        details |= {"verified": verified, "manifest": manifest.to_json()}
        return self._file.as_reported(layout, path.stat().st_size)
