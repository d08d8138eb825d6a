"""The data: what is read, how rows are mapped, and what happens to rows that do not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ._base import PathText, Section

Format = Literal["auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text", "preference", "ranking", "unpaired", "prompt"]


class DataSection(Section):
    """The rows a stage trains on and is tested with."""

    train: PathText
    """Training rows: a .jsonl, .json, .csv or .parquet file, or a hub data set (owner/name[@revision][:split])."""
    test: PathText | None = None
    """Test rows, read once, after every setting is fixed; none means that nothing can be proved."""
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] | PathText = 0.1
    """The share of training rows, drawn by prompt, held out for choices made on the way; or a file of its own."""
    format: Format = "auto"
    """The record format; auto looks at the keys of every row, says what it found, and refuses a mixture."""
    columns: dict[str, str] = {}
    """For CSV, Parquet and own names: our field to the file's column, e.g. {prompt: text, completion: category}."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Longest row in tokens; derived as the longest row, at most the model's context."""
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to a row over max_length: the run is refused, the row is dropped, or its end is cut (conversations and texts only);
    each is in the ledger."""
    test_overlap: Literal["refuse", "drop"] = "refuse"
    """What happens when a test row is also a training row: the run is refused, or the training row is dropped."""
    near_duplicate_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Jaccard similarity of word 3-grams from which two rows are reported as near duplicates."""
    max_rejected: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """The share of unusable rows (quarantined) above which the data is refused."""
