"""What tests need to know of the models of every kind beside their settings."""

from __future__ import annotations

from mhmoe_np.audit.models import KINDS

QUANTISED = [name for name, settings in KINDS.items() if "quantization" in settings]

# Two implementations differ in last bits, and where x * 127/gamma lies half-way between two integers
# those decide: so it does for x = gamma/2, which is common in a BitLinear that reads another's output.
# With these seeds no activation of the float64 tests is that near.
SEEDS = {"mh2-ternary": 3, "mh2-ternary-no-sub-norm": 3, "mh2-ternary-projections": 16}
DEFAULT_SEED = 2
