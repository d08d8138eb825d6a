"""Rotary positions stretched for rows longer than the model was made for: linear interpolation (Chen et al. 2023, arXiv:2306.15595) and
YaRN (Peng et al. 2023, arXiv:2309.00071), as transformers computes them from a config.

Scalings whose frequencies depend on the longest row of a batch are not offered: a row would depend on its company (see layout.py).
"""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from ..recipe import RopeScaling

FULL = "full_attention"  # where layers of several types have frequencies of their own, those of a sliding window see nothing far away


def scale_positions(config: Any, scaling: RopeScaling) -> bool:
    """Sets a model's config to a scaling, and its context to `factor` times what it was; False where the config has that scaling already.

    Raises ModelError for a model without rotary embeddings, or with another scaling.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get(FULL, rope) or {}
    held = rope.get("rope_type")
    if held is None:
        raise ModelError(
            f"{config.model_type} has no rotary position embeddings that a config can scale, so its context is fixed",
            where="model.rope_scaling",
            mend="leave model.rope_scaling out, or tune another model family",
        )
    if (held, rope.get("factor")) == (scaling.rope_type, scaling.factor):
        return False
    if held != "default":
        raise ModelError(
            f"its positions are scaled already ({held}, factor {rope.get('factor')}), and were trained so",
            where="model.rope_scaling",
            mend="leave model.rope_scaling out",
        )
    rope |= scaling.model_dump()  # in place: of several layer types, one
    if scaling.rope_type == "yarn":
        rope["original_max_position_embeddings"] = config.max_position_embeddings
    config.max_position_embeddings = int(config.max_position_embeddings * scaling.factor)
    return True
