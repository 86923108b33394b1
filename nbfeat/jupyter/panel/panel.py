"""Panel: the options of %%extract as widgets, run in the background, with the equivalent code."""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import display

from nbfeat.errors import NbfeatError, RequestError
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import RUN_OPTIONS, spelled
from nbfeat.html import escape, paragraph
from nbfeat.jupyter import grammar
from nbfeat.jupyter.job import FrameSnapshot, Job, State, between_cells, is_running_a_cell, running_cell
from nbfeat.jupyter.panel.blocks import Blocks
from nbfeat.jupyter.panel.result import ELSEWHERE, LOOKS, Result, code_of, progress_of
from nbfeat.jupyter.panel.source import Source, frame_to_open
from nbfeat.jupyter.panel.widgets import STYLE, Kit, OptionWidgets, labelled

SECONDS_BETWEEN = 0.3  # updates of the progress
# Run options offered here; the others are elsewhere in the panel or need free text.
CHOSEN_HERE = {"into", "batch_size", "device", "precision", "allow_remote", "no_cache", "replace"}


class Panel:
    """Choose what to extract by clicking, run it in the background, and copy the equivalent code.

    Parameters
    ----------
    frame : DataFrame or str, optional
        A dataframe of this notebook, or its name; by default the first one with a column of images.

    Attributes
    ----------
    code : str
        The equivalent %%extract cell.
    result : Extraction or None
        The last completed run.

    Raises
    ------
    RequestError
        If this isn't a notebook, or the frame has no name.

    Examples
    --------
    >>> panel = nbfeat.Panel(photos)  # doctest: +SKIP
    """

    def __init__(self, frame: Any = None) -> None:
        self._shell: Any = get_ipython()
        if self._shell is None:
            way = "nbfeat.extract(frame, 'ResNet50', images='path')"
            raise RequestError(f"The panel works only in a notebook. Elsewhere, use `{way}`.")
        chosen = frame_to_open(frame, self._names())
        self.job: Job | None = None
        self.result: Extraction | None = None
        self.code, self.problem = "", ""
        self._request: grammar.Request | None = None
        self._ran: tuple[str, FrameSnapshot] | None = None  # the code and the frame of the job
        self._drawn_at, self._drawn_state = 0.0, State.IDLE
        self._static: Any = None  # display handle of the static report
        self._known_settings = self._settings()
        kit = self._kit = Kit(self._settings, self._changed)
        self.source = Source(kit, self._names)
        self.blocks = Blocks(kit)
        self.options = OptionWidgets(kit, [option for option in RUN_OPTIONS if option.name in CHOSEN_HERE])
        self.results = Result(kit)
        self.extract_button = kit.button("Extract", "go", "Extract the features in the background", self._pressed)
        stops = "Stops after the current batch; finished features are cached"
        self.cancel_button = kit.button("Cancel", "quiet", stops, self.cancel)
        self._progress, self._problem, self._code = map(kit.html, ("progress", "problem", "code"))
        self._spoken = kit.html("spoken")  # screen readers announce states, not every step
        self._style = kit.html("style")
        self.box = self._laid_out()
        hidden = f".nbfeat-still-{self.box.model_id}{{display:none}}"  # hides the static report while the panel is live
        self._style.value = f"<style>{STYLE}</style><style>{hidden}</style>"
        self.source.refresh(chosen)
        self._changed()
        self._cell = running_cell(self._shell)
        self._shell.events.register("post_run_cell", self._after_a_cell)

    def _laid_out(self) -> Any:
        kit = self._kit
        switches = [widget for widget in self.options.values() if isinstance(widget.value, bool)]
        fields = [widget for widget in self.options.values() if widget not in switches]
        head = kit.html("head", "<h3>Image features</h3><span>as new columns of a dataframe</span>")
        run = kit.fold("Run options", kit.box("fields", *fields), kit.box("line", *switches))
        line = kit.box(
            "line", kit.box("buttons", self.extract_button, self.cancel_button), self._progress, self._spoken
        )
        parts = (self.source.box, self.blocks.box, run, line, self._problem, self.results.box, self._code)
        return kit.box("panel", self._style, head, *parts)

    @property
    def state(self) -> State:
        """The state of the run: idle, running, cancelling, cancelled, failed or done."""
        return self.job.state if self.job else State.IDLE

    def extract(self) -> None:
        """Start in the background, or resume a cancelled run if the choices and images haven't changed."""
        with self._kit.turn():
            if self.state.is_busy:
                return
            self._changed()  # a recent choice may still be on its way from another thread
            if self._request is None:
                return
            try:
                if not self._can_resume():
                    self._begin(self._request)
                assert self.job is not None
                self.job.start()
            except NbfeatError as error:
                self.problem = labelled(str(error))
                self._draw()

    def cancel(self) -> None:
        """Stop after the current batch; the frame is unchanged and finished features are cached."""
        if self.job is not None:
            self.job.cancel()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is running.

        Parameters
        ----------
        seconds : float, optional
            The longest time to wait; by default without limit.

        Returns
        -------
        bool
            Whether the run has ended. The cell that waits gets the new frame.
        """
        in_a_cell = is_running_a_cell(self._shell) and threading.current_thread() is threading.main_thread()
        return self.job is None or self.job.wait(seconds, bind=in_a_cell)

    def to_cell(self) -> None:
        """Put the equivalent code in a new cell below the current one."""
        self._shell.set_next_input(self.code)

    def close(self) -> None:
        """Remove the panel and stop its run."""
        self.cancel()
        with suppress(ValueError):  # already closed
            self._shell.events.unregister("post_run_cell", self._after_a_cell)
        self._kit.close()

    def _pressed(self) -> None:
        self.extract()
        if self.state is State.RUNNING:
            self.cancel_button.focus()  # the clicked button is disabled now

    def _begin(self, request: grammar.Request) -> None:
        names = self._shell.user_ns
        frame = grammar.frame_called(request.frame, names).copy(deep=False)
        snapshot = FrameSnapshot(request.frame, frame, request.run.get("into", request.frame))
        options = {"cache": getattr(self._magics, "cache", True), **request.for_extraction}
        extraction = Extraction(snapshot.frame, request.blocks, **options)
        bind = partial(snapshot.bind, names=names, replace=bool(request.run.get("replace")))
        self._ran = self.code, snapshot
        self.job = Job(extraction, bind, partial(between_cells, self._shell), self._moved)

    def _can_resume(self) -> bool:
        """Return whether the cancelled run has the current choices and the same images."""
        if self.job is None or self.state is not State.CANCELLED or self._ran is None:
            return False
        code, snapshot = self._ran
        return code == self.code and not snapshot.why_not(self.job.extraction, self._names().get(snapshot.name))

    def _moved(self) -> None:
        """Show a step or a change of state; called from the worker thread."""
        with self._kit.turn():
            if (job := self.job) is None:  # replaced
                return
            is_new = job.state is not self._drawn_state
            is_rare = is_new or job.is_binding or (job.step is not None and bool(job.step.note))
            if is_rare or time.monotonic() - self._drawn_at >= SECONDS_BETWEEN:
                self._draw()
            if not is_new or job.state.is_busy:
                return
            if job.state is State.DONE:
                self.result = job.extraction
                self.results.show(job.extraction)
                self.source.refresh()
                for card in self.blocks.cards:
                    card.refresh()  # its weights may have been downloaded
            if self._static is not None:
                self._static.update(self._report(), raw=True)

    def _changed(self) -> None:
        """Update the code and the expected columns, or show the problem with the choices."""
        options = spelled(RUN_OPTIONS, {**self.source.given, **self.options.given})
        line = " ".join([self.source.frame.value or "", *options])
        blocks = [card.text for card in self.blocks.cards]
        self.problem, self._request = "", None
        try:
            self._request = grammar.read(line, "\n".join(blocks), self._settings())
            assert self._request is not None
            frame = grammar.frame_called(self._request.frame, self._names())
            Extraction(frame, self._request.blocks, **self._request.for_extraction)  # only checks: nothing runs yet
        except NbfeatError as error:
            self.problem = labelled(str(error))
        self.code = "\n".join(map(grammar.literal, [f"%%extract {line}", *blocks]))
        self._code.value = code_of(self.code, loaded=self._magics is not None)
        chosen, columns = self.source.chosen, len(self.source.images.value or ())
        self.options["into"].placeholder = self.source.frame.value or ""
        self.blocks.expect(0 if chosen is None else len(chosen), columns)
        self._draw()

    def _after_a_cell(self, *_: object) -> None:
        """Refresh after a cell, which may have made, changed or deleted a frame, or set a default."""
        (cell, run), (now, this_run) = self._cell, running_cell(self._shell)
        with self._kit.turn():
            # The cell that opened it ran again and has other output now, or all widgets were closed.
            if (cell and cell == now and run != this_run) or self.box.comm is None:
                self.close()
                self.results.hide()
                self.job = self.result = self._ran = None  # IPython's `Out` may keep the panel
                return
            settings, self._known_settings = self._known_settings, self._settings()
            if self.source.has_news() or settings != self._known_settings:
                self.source.refresh()
                self.options.refresh()
                for card in self.blocks.cards:
                    card.refresh()
                self._changed()

    def _names(self) -> Mapping[str, Any]:
        return dict(self._shell.user_ns)  # a copy, because a cell may be changing it

    @property
    def _magics(self) -> Any:
        return self._shell.magics_manager.registry.get("ExtractMagics")  # None if the extension isn't loaded

    def _settings(self) -> dict[str, Any]:
        return self._magics.defaults() if self._magics else {}

    def _draw(self) -> None:
        """Show the state; during a run only the progress widget changes."""
        state = self.state
        self._progress.value = progress_of(self.job, self._ran[1] if self._ran else None)
        self.extract_button.disabled = state.is_busy or bool(self.problem)
        self.cancel_button.disabled = state is not State.RUNNING
        if state is not State.DONE:
            self.results.hide()  # from an earlier run
        self._problem.value = f"⚠ {escape(self.problem)}" if self.problem else ""
        if state is not self._drawn_state or not self._spoken.value:
            self._spoken.value = f'<span role="status">{LOOKS[state][1]}</span>'
        self._drawn_at, self._drawn_state = time.monotonic(), state

    def _report(self) -> dict[str, str]:
        """Return what replaces the panel when no kernel is running: the report and the code."""
        extraction = self.job.extraction if self.job and self.state is not State.IDLE else None
        report = extraction._repr_html_() if extraction else escape("An nbfeat panel that hasn't run yet.")
        cell = f'{paragraph("Equivalent code")}<pre style="opacity:.8;font-size:90%">{escape(self.code)}</pre>'
        return {
            "text/html": f'<div class="nbfeat-still-{self.box.model_id}">{report}{cell}</div>',
            "text/plain": f"{extraction!r}\nEquivalent code\n{self.code}" if extraction else self.code,
        }

    def _ipython_display_(self) -> None:
        """Show the panel, and the static report, hidden while the panel is live, that is saved with the notebook."""
        display({**self.box._repr_mimebundle_(), "text/plain": ELSEWHERE}, raw=True)  # type: ignore[no-untyped-call]
        if self._static is None:
            self._static = display(self._report(), raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._static.display(self._report(), raw=True)

    def __repr__(self) -> str:
        text = f"Panel({self.source.frame.value or 'no dataframe'}, {self.state.value})"
        return text if len(text) <= 110 else f"{text[:109]}…"
