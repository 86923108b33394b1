"""How each state of a panel looks: one table, and the words that it is filled with."""

from __future__ import annotations

from dataclasses import dataclass

from nbfeat.errors import NbfeatError
from nbfeat.html import Html, bar, escape, paragraph
from nbfeat.jupyter.job import Job, State
from nbfeat.jupyter.progress import counts, progress

ELSEWHERE = "A panel is here while the notebook runs. What is saved of it:"  # and then the static report


@dataclass(frozen=True, slots=True)
class Look:
    """How a state looks: a sign and a word beside every color, what it says, and which buttons can be pressed."""

    sign: str
    word: str
    text: str  # filled with what `_facts` gives
    can_extract: bool = True
    can_cancel: bool = False
    has_bar: bool = False
    has_result: bool = False


LOOKS: dict[State, Look] = {
    State.IDLE: Look("○", "Ready", ""),
    State.RUNNING: Look("▶", "Running", "{progress}", can_extract=False, can_cancel=True, has_bar=True),
    State.CANCELLING: Look("…", "Cancelling", "{counts} · stopping after the batch in hand", can_extract=False,
                           has_bar=True),
    State.CANCELLED: Look("■", "Cancelled", "{counts} · nothing was bound · Extract goes on{kept}", has_bar=True),
    State.FAILED: Look("✕", "Failed", "{error}"),
    State.DONE: Look("✓", "Done", "{name} has {width} new columns · {counts}", has_bar=True, has_result=True),
}  # fmt: skip


def progress_of(job: Job | None, name: str) -> Html:
    """Draw how `job`, whose frame is called `name`, stands: a bar, the sign and word of its state, more words."""
    look, step = LOOKS[job.state if job else State.IDLE], job.step if job else None
    text = look.text.format_map(_facts(job, name)) if job else look.text
    line = f'<b class="nbfeat-{look.word.lower()}">{look.sign} {look.word}</b> {escape(text)}'
    share = step.done / step.total if step and step.total else 0.0
    return Html((bar(share) if look.has_bar else "") + f"<div>{line}</div>")


def _facts(job: Job, name: str) -> dict[str, object]:
    """Return what the words of a Look are filled with."""
    extraction, step, error = job.extraction, job.step, job.error
    now = progress(step) if step and step.done else job.coming or "starting"
    return {
        "name": name,
        "width": f"{len(extraction.columns):,}" if extraction.state == "done" else "",
        "counts": " · ".join(counts(step)) if step else "no images",
        "progress": "all computed · waiting for the running cell to end" if job.is_binding else now,
        "kept": ", what is done is kept" if extraction.keeps else "",
        # Of an error that is none of nbfeat's own, its kind too.
        "error": error if error is None or isinstance(error, NbfeatError) else f"{type(error).__name__}: {error}",
    }


def code_of(code: str, *, loaded: bool) -> Html:
    """Draw the cell that does the same: a click selects all of it."""
    first = "" if loaded else " after <code>%load_ext nbfeat</code>"
    return Html(
        f'<h4>Same as{first}</h4><pre title="A click selects all of it">{escape(code)}</pre>'
        "<div>Click it and press Ctrl+C to copy; <code>%extract_panel --code</code> puts it into a new cell.</div>"
    )


def static_report(job: Job | None, code: str, number: str) -> dict[str, str]:
    """Return what stands for the panel of that `number` where there is no kernel: the report, and the code."""
    extraction = job.extraction if job and job.state is not State.IDLE else None
    report = extraction._repr_html_() if extraction else escape("A panel of nbfeat in which nothing has run yet.")
    cell = f'{paragraph("Same as")}<pre style="opacity:.8;font-size:90%">{escape(code)}</pre>'
    return {
        "text/html": f'<div class="nbfeat-still-{number}">{report}{cell}</div>',
        "text/plain": f"{extraction!r}\nSame as\n{code}" if extraction else code,
    }
