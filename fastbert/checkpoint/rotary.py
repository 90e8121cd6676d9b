"""This module reads the layers of encoders with rotary positions from a config: bases of angles and attention windows.

A config here is a `BertConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastbert.checks import expect

FULL, SLIDING = "full_attention", "sliding_attention"
BASES = {FULL: 160_000.0, SLIDING: 10_000.0}  # ModernBERT's, if a config.json has none
EVERY = 3  # every third layer of ModernBERT sees the whole text, also the first one


@dataclass(frozen=True)
class RotaryLayer:
    """A RotaryLayer is one layer: the base of its angles, the divisor of positions, and its window.

    window: the columns that attention reaches on either side, None for all.
    """

    base: float
    factor: float = 1.0
    window: int | None = None


def setting(config: Any, name: str) -> Any:
    """Returns a setting that is no field of BertConfig, by default the family's."""
    return config.extra.get(name, config.family.defaults.get(name))


def modernbert_layers(config: Any) -> tuple[RotaryLayer, ...]:
    """Returns the layers of a ModernBERT, from first to last.

    Both published forms of config.json are read. The older has global_rope_theta, local_rope_theta (None for the global
    one) and global_attn_every_n_layers. The newer has layer_types and rope_parameters, which have priority. A window
    reaches local_attention // 2 columns, or sliding_window if a config.json has it. Raises ValueError for layers or
    angles that fastbert does not compute.
    """
    window, half = setting(config, "local_attention"), config.extra.get("sliding_window")
    expect(isinstance(window, int) and window >= 0, "local_attention", window, "a whole number, 0 or more")
    if half is not None:  # It is a property of transformers' config, and has priority over local_attention.
        expect(isinstance(half, int) and half >= 0, "sliding_window", half, "a whole number, 0 or more")
        window = 2 * half
    types = layer_types(config)
    kinds = {kind: _angles(config, kind) for kind in set(types)}
    layers = {
        kind: RotaryLayer(base, factor, window // 2 if kind == SLIDING else None)
        for kind, (base, factor) in kinds.items()
    }
    return tuple(layers[kind] for kind in types)


def gated_rotary_layer(config: Any) -> RotaryLayer:
    """Returns the rotation of every layer of a Nomic or a GTE model.

    The base is rope_parameters' or rope_theta. rope_scaling {"type": "ntk", "factor": f} multiplies the base by f, and
    divides positions by f^(2 / D), as GTE's published code does (https://kexue.fm/archives/9706). Raises ValueError for
    angles that fastbert does not compute.
    """
    base, extra = setting(config, "rope_theta"), config.extra
    parameters: Any = {**(extra.get("rope_parameters") or {}), **(extra.get("rope_scaling") or {})}
    base = parameters.get("rope_theta", base)
    kind, factor = parameters.get("rope_type", parameters.get("type", "default")), parameters.get("factor", 1.0)
    expect(kind in ("default", "linear", "ntk"), "rope_type", kind, "'default', 'linear' or 'ntk'")
    mixed = parameters.get("mixed_b")
    expect(mixed is None, "mixed_b", mixed, "None")
    _expect_positive(base, factor)
    if kind == "ntk":
        return RotaryLayer(float(base * factor), float(factor ** (2 / config.head_size)))
    return RotaryLayer(float(base), float(factor) if kind == "linear" else 1.0)


# Settings of the hub's own code for Nomic and GTE, with the only value that fastbert computes.
ONLY = {
    "activation_function": "swiglu", "causal": False, "layer_norm_type": "layer_norm", "logn_attention_scale": False,
    "mlp_fc1_bias": False, "mlp_fc2_bias": False, "moe_every_n_layers": 0, "parallel_block": False, "prenorm": False,
    "qkv_proj_bias": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None, "use_rms_norm": False,
}  # fmt: skip


def modern_angles(config: Any) -> dict[str, Any]:
    """Returns `extra` of a Nomic or a GTE model with its angles in transformers' form, in rope_parameters.

    Raises ValueError for a setting that fastbert does not compute.
    """
    for name, value in ONLY.items():
        got = config.extra.get(name, value)
        expect(got == value or (not got and not value), name, got, repr(value))
    layer = gated_rotary_layer(config)
    kept = {name: value for name, value in config.extra.items() if name not in ("rope_theta", "rope_scaling")}
    angles = {"rope_type": "default", "rope_theta": layer.base}
    if layer.factor != 1.0:
        angles |= {"rope_type": "linear", "factor": layer.factor}
    return {**kept, "rope_parameters": angles}


def _expect_positive(base: Any, factor: Any) -> None:
    expect(isinstance(base, (int, float)) and base > 0, "rope_theta", base, "a positive number")
    expect(isinstance(factor, (int, float)) and factor > 0, "factor", factor, "a positive number")


def layer_types(config: Any) -> list[str]:
    """Returns "full_attention" or "sliding_attention" for each layer."""
    n_layers, types = config.num_hidden_layers, setting(config, "layer_types")
    if types is None:
        every = setting(config, "global_attn_every_n_layers") or EVERY
        return [SLIDING if i % every else FULL for i in range(n_layers)]
    expected = f"{FULL!r} or {SLIDING!r} for each of {n_layers} layers"
    fits = isinstance(types, (list, tuple)) and len(types) >= n_layers and set(types) <= {FULL, SLIDING}
    expect(fits, "layer_types", types, expected)
    return list(types[:n_layers])


def _angles(config: Any, kind: str) -> tuple[float, float]:
    """Returns the base of the angles, and the divisor of positions."""
    older = {FULL: config.extra.get("global_rope_theta"), SLIDING: config.extra.get("local_rope_theta", BASES[SLIDING])}
    older[FULL] = BASES[FULL] if older[FULL] is None else older[FULL]
    base = older[FULL] if older[kind] is None else older[kind]
    parameters: Any = (config.extra.get("rope_parameters") or {}).get(kind) or {}
    scaling: Any = config.extra.get("rope_scaling") or {}
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        expect(isinstance(value, Mapping), name, value, "a dict")
    parameters = {**parameters, **scaling}
    base = parameters.get("rope_theta", base)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    expect(rope_type in ("default", "linear"), "rope_type", rope_type, "'default' or 'linear'")
    factor = parameters.get("factor", 1.0) if rope_type == "linear" else 1.0
    _expect_positive(base, factor)
    return float(base), float(factor)
