"""A survey in words."""

from collections.abc import Sequence

from ovis25.data.samples import Defect
from ovis25.data.survey import MAX_LISTED, Survey


def defects_text(defects: Sequence[Defect], num_rows: int, source: str, note: str = "") -> str:
    """What is wrong with data that cannot be used: up to 20 samples a line each, and the cure."""
    noun = f"{'sample' if num_rows == 1 else 'samples'} {'has a defect' if len(defects) == 1 else 'have defects'}"
    lines = [f"{len(defects)} of {num_rows} {noun}:", *_listed(defects, source)]
    return "\n".join([*lines, f"Mend them, or set on_bad_sample to skip.{note}"])


def survey_text(survey: Survey) -> str:
    """The whole survey: what is used, how long it is, and the defects by their kind, up to 20 of each."""
    counts = survey.statistics()
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.kinds.items())
    lines = [f"{survey.source}: {counts.num_samples:,} of {survey.num_rows:,} samples can be used"]
    if kinds:
        about = "about " if counts.is_estimate else ""
        lines += [
            f"kinds    {about}{kinds}",
            f"tokens   {about}{counts.total_tokens:,} ({counts.learned_tokens:,} learned, {counts.visual_tokens:,} "
            f"visual), the longest {counts.longest:,}",
        ]
    if counts.num_shrunk:
        lines.append(f"shrunk   {counts.num_shrunk:,} samples get smaller pictures to keep their length limit")
    if counts.unused_keys:
        lines.append(f"unread   {', '.join(f'{key} ({count:,})' for key, count in counts.unused_keys.items())}")
    for kind, defects in survey.by_kind().items():
        lines += [f"{kind.replace('_', ' ')}: {len(defects):,}", *_listed(defects, survey.source)]
    if not survey.is_whole:
        lines.append("Picture headers and lengths are checked once these are mended.")
    return "\n".join(lines)


def _listed(defects: Sequence[Defect], source: str) -> list[str]:
    listed = [f"  {defect.describe(source)}" for defect in defects[:MAX_LISTED]]
    return listed if len(defects) <= MAX_LISTED else [*listed, f"  ... and {len(defects) - MAX_LISTED} more"]
