"""A checkpoint of one file, staged as a rank leaves it before it is published."""

from __future__ import annotations

from mics_ds.checkpoint import folder as folders
from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.manifest import Manifest


def staged(folder, tag="t", content=b"abc", steps=1):
    """A folder with one file, ready to be published, and its manifest."""
    target = folder / tag
    staging = folders.Staging(target, "0123456789ab").folder
    staging.mkdir()
    (staging / "a_model_states.pt").write_bytes(content)
    files = {"a_model_states.pt": manifest.seal(staging / "a_model_states.pt", 3)}
    return staging, target, Manifest(tag, 2, 2, 4, (2, 2), 1, steps, False, {"mics_ds": "0"}, files, "0123456789ab")
