"""Panel: the choices of %%extract as widgets, the same work, and the code of what was clicked.

How each state of the work looks is in one table, `panel_look.LOOKS`. The parts are modules of their own:
`panel_source`, `panel_blocks`, `panel_run`, `panel_result`. The work is a Job in a thread, whose result is bound
between cells.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from nbfeat.errors import NbfeatError, RequestError
from nbfeat.extraction.extraction import Extraction
from nbfeat.html import escape
from nbfeat.jupyter import grammar
from nbfeat.jupyter.binding import Held, between_cells, is_in_a_cell
from nbfeat.jupyter.expansion import literal
from nbfeat.jupyter.job import Job, State
from nbfeat.jupyter.panel import look
from nbfeat.jupyter.panel.blocks import Blocks
from nbfeat.jupyter.panel.result import Result
from nbfeat.jupyter.panel.run import RunOptions
from nbfeat.jupyter.panel.source import Source, frame_to_open
from nbfeat.jupyter.panel.widgets import Kit, answer_at_once, style

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

SECONDS_BETWEEN = 0.3  # updates of the progress: each is one message, and all others come with a change of state
LONGEST_REPR = 110


class Panel:
    """Choose what to extract by clicking, run it beside the notebook, and take the code of what was clicked.

    Parameters
    ----------
    frame
        A dataframe of this notebook, or its name; by default the first one with a column of images.

    Attributes
    ----------
    code
        The cell that does the same.
    result
        The Extraction of the last run that was done, or None.
    state
        How the work stands.

    Raises
    ------
    RequestError
        Where there is no notebook, or no name for the frame.

    Examples
    --------
    >>> nbfeat.Panel(photos)  # doctest: +SKIP
    """

    def __init__(self, frame: Any = None) -> None:
        self._shell = _shell()
        chosen = frame_to_open(frame, self._names())
        self.job: Job | None = None
        self.result: Extraction | None = None
        self.code, self.problem = "", ""
        self._request: grammar.Request | None = None
        self._ran: tuple[str, Held] | None = None  # what the job works at
        self._drawn_at, self._drawn_state = 0.0, State.IDLE
        self._still: Any = None  # the handle of the static report
        self._is_ready = False

        settings = self._known_settings = self._settings()
        kit = self._kit = Kit()
        self.source = Source(kit, self._names, lambda: str(self._settings().get("root", "")), self._changed)
        self.blocks = Blocks(kit, settings, self._changed)
        self.options = RunOptions(kit, settings, self._changed)
        self.results = Result(kit)
        self.extract_button = kit.button("Extract", "go", "Extract the features, beside the notebook", self._pressed)
        self.cancel_button = kit.button(
            "Cancel", "quiet", "Stop after the batch in hand; what is done is kept", self.cancel
        )
        self._progress, self._problem, self._code = map(kit.html, ("progress", "problem", "code"))
        self._spoken = kit.html("spoken")  # for screen readers, which are told of states and not of every step
        self._buttons = kit.box("buttons", [self.extract_button, self.cancel_button])
        self.box = kit.box(
            "panel",
            [
                kit.html("head", "<h3>Image features</h3><span>as new columns of a dataframe</span>"),
                self.source.box,
                self.blocks.box,
                self.options.box,
                kit.box("line", [self._buttons, self._progress, self._spoken]),
                self._problem,
                self._code,
                self.results.box,
            ],
        )
        self._hide = kit.html("style", f"{style()}<style>.nbfeat-still-{self.box.model_id}{{display:none}}</style>")
        self.box.children = (self._hide, *self.box.children)
        self.source.refresh(chosen)
        self._is_ready = True
        self._changed()
        self._draw()
        answer_at_once(self.box)
        self._shell.events.register("post_run_cell", self._after_a_cell)

    # Working

    @property
    def state(self) -> State:
        """How the work stands."""
        return self.job.state if self.job else State.IDLE

    def extract(self) -> None:
        """Start, or go on with what was cancelled, where nothing was chosen otherwise meanwhile."""
        with self._kit.turn:
            if self.state.is_busy:
                return
            self._changed()  # a choice made just before may be on its way in another thread
            if self._request is None:
                return
            try:
                if not self._can_go_on():
                    self._begin(self._request)
            except NbfeatError as error:
                self.problem = str(error)
                self._draw()
                return
            if self.job is not None:
                self.job.start()

    def cancel(self) -> None:
        """Stop after the batch in hand. Nothing is bound; what is done is kept."""
        if self.job is not None:
            self.job.cancel()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is running, and tell whether that came about; the cell that waits binds the frame."""
        return self.job is None or self.job.wait(seconds, bind=is_in_a_cell(self._shell))

    def to_cell(self) -> None:
        """Put the code into a new cell below the one that calls this."""
        self._shell.set_next_input(self.code)

    def close(self) -> None:
        """Take the panel off the screen, and stop what it does."""
        self.cancel()
        if self._after_a_cell in self._shell.events.callbacks["post_run_cell"]:
            self._shell.events.unregister("post_run_cell", self._after_a_cell)
        self._kit.close()

    def _pressed(self) -> None:
        self.extract()
        if self.state is State.RUNNING:
            self.cancel_button.focus()  # the button that was clicked can be pressed no more

    def _begin(self, request: grammar.Request) -> None:
        """Make a job of what is asked for."""
        names = self._shell.user_ns
        held = Held.of(request.frame, names)
        magics = _magics(self._shell)
        cache = {} if magics is None else {"cache": magics.cache}
        extraction = Extraction(held.frame, request.blocks, **{**cache, **request.for_extraction})
        replace = bool(request.run.get("replace"))
        self._ran = self.code, held
        self.job = Job(
            extraction,
            bind=lambda done: held.bind(done, names, replace=replace),
            soon=lambda work: between_cells(self._shell, work),
            tell=self._told,
        )

    def _can_go_on(self) -> bool:
        """Tell whether what was cancelled is what is asked for now, of the same images."""
        if self.job is None or self.state is not State.CANCELLED or self._ran is None:
            return False
        code, held = self._ran
        return code == self.code and not held.why_not(self.job.extraction, self._names().get(held.name))

    def _told(self) -> None:
        """Show a step or a change of state; called by the thread that works."""
        with self._kit.turn:
            is_new, job = self.state is not self._drawn_state, self.job
            is_told = job is not None and (job.is_binding or (job.step is not None and bool(job.step.note)))  # few
            if is_new or is_told or time.monotonic() - self._drawn_at >= SECONDS_BETWEEN:
                self._draw()
            if job is not None and is_new and not self.state.is_busy:
                self._ended(job)

    def _ended(self, job: Job) -> None:
        if job.state is State.DONE:
            self.result = job.extraction
            self.results.show(job.extraction)
            self.source.refresh()
            answer_at_once(self.box)
        if self._still is not None:
            self._still.update(look.still(self.job, self.code, self.box.model_id), raw=True)

    # Choosing

    def _changed(self) -> None:
        """Write the code of what is chosen, and say what it will give, or why it cannot be."""
        if not self._is_ready:
            return
        run = {**self.source.run, **self.options.given}
        lines = grammar.written(self.source.frame.value or "", run, [card.text for card in self.blocks.cards])
        self.problem, self._request = "", None
        try:
            self._request = self._read(lines)
            self._check(self._request)
        except NbfeatError as error:
            self.problem = str(error)
        self.code = "\n".join(map(literal, lines.split("\n")))
        self._code.value = look.code_of(self.code, loaded=_magics(self._shell) is not None)
        frame, columns = self.source.chosen, len(self.source.images.value or ())
        self.blocks.tell(0 if frame is None else len(frame), columns)
        self._draw()

    def _read(self, lines: str) -> grammar.Request:
        head, _, body = lines.partition("\n")
        request = grammar.read(head.removeprefix("%%extract "), body, self._settings())
        assert request is not None
        return request

    def _check(self, request: grammar.Request) -> None:
        """Raise where the request cannot be; an Extraction that was just made has done nothing."""
        frame = grammar.check_name(request.frame, self._names())
        Extraction(frame, request.blocks, **request.for_extraction)

    def _after_a_cell(self, *_: object) -> None:
        """Look at the notebook again: a cell may have made, changed or deleted a frame, or set a default."""
        with self._kit.turn:
            settings, self._known_settings = self._known_settings, self._settings()
            if self.source.has_news() or settings != self._known_settings:
                self.source.refresh()
                self.blocks.obey(self._known_settings)
                self.options.obey(self._known_settings)
                self._changed()
                answer_at_once(self.box)

    # The notebook

    def _names(self) -> MutableMapping[str, Any]:
        return dict(self._shell.user_ns)  # a cell may be changing it just now

    def _settings(self) -> dict[str, Any]:
        magics = _magics(self._shell)
        return {} if magics is None else magics.defaults()

    # Showing

    def _draw(self) -> None:
        """Show how it stands: while it runs one widget changes, the others with the state."""
        with self._kit.turn:
            state = self.state
            shown = look.LOOKS[state]
            self._progress.value = look.progress_of(self.job, self._ran[1].name if self._ran else "")
            self.extract_button.disabled = not shown.can_extract or bool(self.problem)
            self.cancel_button.disabled = not shown.can_cancel
            if not shown.has_result:
                self.results.hide()  # it is another run's
            self._problem.value = f"⚠ {escape(self.problem)}" if self.problem else ""
            if state is not self._drawn_state or not self._spoken.value:
                self._spoken.value = f'<span role="status">{shown.word}</span>'
            self._drawn_at, self._drawn_state = time.monotonic(), state
            answer_at_once(self._buttons)

    def _ipython_display_(self) -> None:
        """Show the panel, and beside it, unseen while it lives, the static report that is saved with the notebook."""
        from IPython.display import display

        bundle = {**self.box._repr_mimebundle_(), "text/plain": look.ELSEWHERE}
        display(bundle, raw=True)  # type: ignore[no-untyped-call]
        if self._still is None:
            self._still = display(look.still(self.job, self.code, self.box.model_id), raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._still.display(look.still(self.job, self.code, self.box.model_id), raw=True)

    def __repr__(self) -> str:
        """Return how it stands in one short line."""
        name = self.source.frame.value or "no dataframe"
        text = f"Panel({name}, {self.state.value})"
        return text if len(text) <= LONGEST_REPR else text[: LONGEST_REPR - 1] + "…"


def _shell() -> InteractiveShell:
    """Return the notebook's shell."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise RequestError(
            "The panel works in a notebook. Elsewhere, use nbfeat.extract(frame, 'ResNet50', images='path')."
        )
    return shell


def _magics(shell: InteractiveShell) -> Any:
    """Return the magics with their settings, None where the extension is not loaded."""
    return shell.magics_manager.registry.get("ExtractMagics")
