"""The card of the emotion head: architecture, training data, and figures on unseen actors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.emotion_measures import Recalls, Report

# One sentence a line, as in all of docs/.
LICENCE = (
    "## Licence and limits",
    "",
    "**The training data are acted and partly non-commercial. "
    "The weights are therefore non-commercial too.**",
    "",
    "- RAVDESS (Livingstone and Russo 2018): CC BY-NC-SA 4.0. "
    "North American actors speak two sentences in each emotion, on demand.",
    "- EmoDB (Burkhardt and others 2005): free for research, without a formal licence. "
    "German actors speak ten everyday sentences.",
    "- LibriSpeech (CC BY 4.0) and speechocean762 (CC BY 4.0): read speech, used as neutral.",
    "",
    "`model/weights/emotion.safetensors` therefore carries CC BY-NC-SA 4.0, "
    "unlike the rest of the repository (Apache-2.0).",
    "For commercial use set `[emotion] enabled = false`: "
    "then the file is not loaded, nothing is scheduled, and it may be deleted.",
    "",
    "Acted emotion is louder and purer than emotion in conversation, "
    "and these are few actors of two languages.",
    "The label says which acted emotion a voice resembles, not what a person feels.",
    "Do not use it to make decisions about people.",
    "The European Union's AI Act prohibits inferring emotions at work and in schools, "
    "except for medical and safety reasons.",
    "",
)


def write_card(path: Path, report: Report, labels: Sequence[str], taps: Sequence[int], n_bytes: int) -> None:
    """Write the card; everything in it but the words comes from the report."""
    summary = report.summary
    parts = [
        "# The emotion head",
        "",
        "Written by `training/emotion.py`; do not edit.",
        "",
        f"A linear map, {n_bytes:,} bytes, from pooled hidden states of the embedded Whisper base to "
        f"{len(labels)} labels: {', '.join(labels)}.",
        "It reads the encoder pass that the words use: mean and deviation over time, over the last 4 s of "
        f"speech, of the outputs of encoder layers {', '.join(str(tap) for tap in taps)}.",
        "Valence and arousal are not trained: they are the labels' places in the circumplex (Russell and "
        "Mehrabian 1977), weighted by the scores.",
        "",
        "## Held-out actors",
        "",
        "Cross-validated over actors in six folds, on windows of streams as the server cuts them. A clip's "
        "answer is the average of its windows, and `neutral` where the likeliest label is below "
        "the tracker's limit.",
        "Clips in which endpointing finds no speech have no window and are not counted.",
        "UAR is the unweighted average of the classes' recalls, ECE the expected calibration error.",
        "",
        "| | clips | actors | UAR | accuracy | ECE | UAR by fold |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, recalls in (("RAVDESS", report.ravdess), ("EmoDB", report.emodb)):
        folds = " ".join(f"{uar:.2f}" for uar in report.by_fold[name.lower()])
        parts.append(
            f"| {name} | {recalls.n_clips} | {recalls.n_speakers} | {recalls.uar:.3f} | "
            f"{recalls.accuracy:.3f} | {recalls.calibration_error:.3f} | {folds} |"
        )
    parts += [
        "",
        f"ECE over both: {summary.calibration_error:.3f}. "
        f"RAVDESS at a single tick, in mid-speech: UAR {summary.tick_uar:.3f}; at a single point after other "
        f"speech, in noise or in a room ({summary.n_altered} windows): {summary.altered_uar:.3f}.",
        "Windows of read speech by other readers called angry, fearful or disgust: "
        f"{summary.read_negative:.1%}.",
    ]
    for name, recalls in (("RAVDESS", report.ravdess), ("EmoDB", report.emodb)):
        parts += ["", f"### {name}: recall and confusion", "", *_table(recalls, labels)]
    parts += ["", *LICENCE]
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(recalls: Recalls, labels: Sequence[str]) -> list[str]:
    """True labels down, said labels across."""
    lines = ["| acted | recall | " + " | ".join(labels) + " |", "|---" * (len(labels) + 2) + "|"]
    for truth, row in recalls.confusion.items():
        cells = " | ".join(str(row[label]) for label in labels)
        lines.append(f"| {truth} | {recalls.recall[truth]:.3f} | {cells} |")
    return lines
