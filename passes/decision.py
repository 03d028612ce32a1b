"""The record that everything hangs on: what was decided about one site, by which method, and how it came out.

A decision names a pass and its options, never a method's code, so a profile replays without the method that found it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["proposed", "kept", "refused", "failed", "rolled_back"]


class Decision(BaseModel):
    """One site and one method.

    `predicted_gain` is the share of the phase's multiply-adds that runs on the faster operator. Errors are relative
    L2 distances: `local_error` at the site's own output (same input), `output_error` at the program's output with
    only this site rewritten. `measured_gain` is the site's time before divided by its time after.
    """

    model_config = ConfigDict(extra="forbid")

    site: str = Field(description="Site id: phase, module path, kind and ordinal.")
    method: str = Field(description="Name of the method that decided.")
    pass_name: str = Field(description="Pass that rewrites the site.")
    options: dict[str, Any] = Field(default_factory=dict, description="The pass's fields.")
    status: Status = "proposed"
    reason: str = Field("", description="Why it was refused, failed or was rolled back; empty where it was kept.")
    facts: dict[str, str] = Field(default_factory=dict, description="What was known of the site.")
    figures: dict[str, Any] = Field(default_factory=dict, description="What was measured by head, of attentions.")
    predicted_gain: float | None = None
    measured_gain: float | None = None
    local_error: float | None = None
    output_error: float | None = None

    @property
    def phase(self) -> str:
        """The phase that the site belongs to."""
        return self.site.split("/", 1)[0]

    @property
    def place(self) -> str:
        """The site id without its phase: one place in the model, whatever the phase."""
        return self.site.split("/", 1)[1]
