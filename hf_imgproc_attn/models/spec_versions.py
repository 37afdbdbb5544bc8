"""Versions of what the filter fields of a configuration mean, and how older files are read."""

from typing import Any

FILTER_SPEC_VERSION = 5
"""Saved with every configuration. It goes up with each change that older code would misread (a new value, a new field,
another default); newer code reads all older versions.

1: boosters with two steps by default, written into every file, boosted or not.
2: all kernels, boosters, residual schemes and feedbacks; ``boosting_steps`` is None for a booster's own default.
3: the field ``learn_feedback``.
4: the field ``gradient_boosting_source``, and ``boosting_steps`` as the rounds of ``gradient_boosted``, which had two.
5: the boosters ``inversion``, ``dynamic_inversion``, ``exclusive``, ``differential``, ``local_linear``, ``robust`` and
   ``delta``, the fields ``gate``, ``normalisation``, ``robust_penalty`` and ``robust_threshold``, content ``cosine``,
   position ``forget``, feedback ``value_residual``.
"""


def check_version(version: Any) -> None:
    """Refuse a configuration that newer code has written: its fields may mean what this code does not know.

    Raises:
        ValueError: naming the version and the newest that is known.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"filter_spec_version must be an integer >= 1, got {version!r}")
    if version > FILTER_SPEC_VERSION:
        raise ValueError(
            f"filter_spec_version must be <= {FILTER_SPEC_VERSION}, the newest that this code knows, got {version}: "
            "the checkpoint was saved by a newer hf_imgproc_attn; upgrade the package, or load it with "
            "trust_remote_code=True where the package is not imported"
        )


def bring_up_to_date(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved configuration as this version writes them; the argument is left as it is.

    Raises:
        ValueError: for a ``filter_spec_version`` that this code does not know.
    """
    # Configurations that were saved before there was a version are of the first one.
    version = config_dict.get("filter_spec_version", 1)
    check_version(version)
    fields = {**config_dict, "filter_spec_version": FILTER_SPEC_VERSION}
    if version == 1 and fields.get("boosting_steps") == 2:
        # Two were the default of the only booster there was, and still are.
        fields["boosting_steps"] = None
    boosting = fields.get("boosting")
    if version < 4 and isinstance(boosting, list) and "gradient_boosted" in boosting:
        fields["boosting_steps"] = _two_rounds(fields.get("boosting_steps"), boosting)
    return fields


def _two_rounds(steps: Any, boosting: list[Any]) -> Any:
    """``boosting_steps`` of layers that differ: gradient boosting had two rounds whatever was meant for the others."""
    if steps is None or (isinstance(steps, list) and len(steps) != len(boosting)):
        return steps
    counts = steps if isinstance(steps, list) else [steps] * len(boosting)
    return [2 if name == "gradient_boosted" else count for name, count in zip(boosting, counts, strict=True)]
