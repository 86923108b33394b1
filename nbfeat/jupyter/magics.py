"""The magics %extract, %%extract, %extract_panel, %backbones and %extract_cache, and their settings."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import closing
from functools import partial, wraps
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic as both, line_magic, magics_class, no_var_expand
from traitlets import Bool, TraitError, Unicode, validate

from nbfeat.backbones.catalog import backbones
from nbfeat.cache.storage import KINDS, storage
from nbfeat.errors import NbfeatError, RequestError
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import OPTIONS
from nbfeat.jupyter import grammar, progress

_MATCHER = "nbfeat"
_FOR_A_NOTEBOOK = (
    "pooling", "normalize", "weights", "scaling", "resize", "interpolation",
    "images", "root", "batch_size", "device", "precision", "on",
)  # fmt: skip
TRAITS = {option.name: option for option in OPTIONS if option.name in _FOR_A_NOTEBOOK}  # defaults of a whole notebook


def reported(kind: Callable[..., Any], magic: Callable[..., Any]) -> Any:
    """Turn a method into a magic: bad usage raises UsageError, other errors show as one line (`short_errors`)."""

    @wraps(magic)
    def run(self: ExtractMagics, *words: str) -> Any:
        try:
            return magic(self, *words)
        except RequestError as error:
            raise UsageError(grammar.respelled(str(error))) from None
        except (NbfeatError, KeyboardInterrupt) as error:
            error.args = (grammar.respelled(str(error)),)
            if self.short_errors:
                text = f"{type(error).__name__}: {error}"
                error._render_traceback_ = lambda: [text]  # type: ignore[union-attr]  # IPython's protocol
            raise

    return no_var_expand(kind(run))


@magics_class
class ExtractMagics(Magics):
    """Image features as columns of a dataframe."""

    shell: InteractiveShell
    backbone = Unicode("", help="the backbone for cells that don't name one").tag(config=True)
    cache = Bool(True, help="read features from the cache and save new ones to it").tag(config=True)
    quiet = Bool(False, help="show no progress").tag(config=True)
    short_errors = Bool(True, help="show errors as one line; False for the full traceback").tag(config=True)
    locals().update(
        (name, Unicode("", help=f"{option.help}; empty for the default ({option.default})").tag(config=True))
        for name, option in TRAITS.items()
    )
    _panel: Any = None  # the last panel opened here (weak)

    @validate(*TRAITS)
    def _checked(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        try:
            if value:
                TRAITS[name].check(value)
        except RequestError as error:
            raise TraitError(str(error)) from None
        return str(value)

    @partial(reported, both)
    def extract(self, line: str, cell: str | None = None) -> Extraction | None:
        """Attach image features as columns; `grammar.usage` provides the text for ``%extract?``."""
        names = dict(self.shell.user_ns)
        expanded = [grammar.expand(text, names) for text in (line, *(cell or "").splitlines())]
        request = grammar.read(expanded[0], "\n".join(expanded[1:]), self.defaults())
        if request is None:
            print(grammar.usage())  # noqa: T201 - what -h does
            return None
        frame = grammar.frame_called(request.frame, names)
        options = {**({} if "parquet" in request.run else {"cache": self.cache}), **request.for_extraction}
        if "like" in options:
            options["like"] = grammar.result_called(options["like"], names)
        extraction = Extraction(frame, *request.blocks, **options)
        try:
            with closing(extraction.steps()) as steps:
                progress.follow(request.frame, steps, quiet=request.run.get("quiet", self.quiet))
        except KeyboardInterrupt:
            done, total = extraction.done - len(extraction.failures), extraction.total
            text = f"stopped at {done:,} of {total:,} images, and nothing was saved. Run the cell again."
            if extraction.keeps:
                text = f"{extraction.kept:,} of {total:,} images are saved. Run the cell again to continue."
            raise KeyboardInterrupt(f"{request.frame} is unchanged; {text}") from None
        if extraction.written:
            extraction.notes.append(f"{request.frame} is unchanged: the features are only on disk.")
        else:
            self.shell.user_ns[request.run.get("into", request.frame)] = extraction.frame
        # IPython's own check for a semicolon parses the words as Python and fails on a lone bracket.
        return None if grammar.is_silenced(line if cell is None else cell) else extraction

    @partial(reported, line_magic)
    def extract_panel(self, line: str) -> Any:
        """Choose by clicking: ``%extract_panel [FRAME]``; ``%extract_panel --code`` puts its code in a new cell."""
        from nbfeat.jupyter.panel.panel import Panel

        expanded = grammar.expand(line, dict(self.shell.user_ns))
        words = grammar.words_of(expanded)
        if words == [grammar.CODE]:
            if (panel := self._panel and self._panel()) is None:
                raise RequestError("No panel is open. Open one first with `%extract_panel photos`, then run it again.")
            panel.to_cell()
            return None
        if len(words) > 1 or not all(map(str.isidentifier, words)):
            raise RequestError(f"%extract_panel needs the name of a dataframe or --code, not {expanded.strip()!r}.")
        panel = Panel(*words)
        self._panel = weakref.ref(panel)
        return None if grammar.is_silenced(line) else panel

    @partial(reported, line_magic)
    def backbones(self, line: str) -> Any:
        """List the backbones that match a pattern: ``%backbones Res*``."""
        return backbones(line.strip().removesuffix(";").strip() or "*")

    @partial(reported, line_magic)
    def extract_cache(self, line: str) -> Any:
        """Show what nbfeat has cached, or clear it: ``clear [features|networks|weights|precisions|all]``."""
        words = grammar.words_of(line)
        if len(words) > 2 or words[:1] not in ([], ["clear"]):
            raise RequestError(f"Use %extract_cache alone or with clear [{'|'.join(KINDS)}], not {line.strip()!r}.")
        if words:
            storage.clear(*words[1:])
        return storage

    def defaults(self) -> dict[str, Any]:
        """Return the non-empty settings as options."""
        values = {name: [value] if TRAITS[name].repeat else value for name in TRAITS if (value := getattr(self, name))}
        given = {name: TRAITS[name].check(value) for name, value in values.items()}
        return {**given, "backbone": self.backbone} if self.backbone else given


ExtractMagics.extract.__doc__ = grammar.usage()


def load(shell: InteractiveShell) -> None:
    """Register the magics and their completion."""
    unload(shell)
    shell.register_magics(ExtractMagics(shell=shell))  # also adds itself to the configurables

    @context_matcher(identifier=_MATCHER, priority=100)  # type: ignore[untyped-decorator]
    def match(at: CompletionContext) -> SimpleMatcherResult:
        word, found = grammar.completions(at.full_text, at.cursor_line, at.cursor_position, shell.user_ns)
        fitting = [SimpleCompletion(text=one, type="nbfeat") for one in found]
        return {"completions": fitting, "matched_fragment": word, "suppress": True}

    if completer := getattr(shell, "Completer", None):
        completer.custom_matchers.append(match)


def unload(shell: InteractiveShell) -> None:
    """Remove the magics, the settings and the completion."""
    if completer := getattr(shell, "Completer", None):
        kept = [one for one in completer.custom_matchers if getattr(one, "matcher_identifier", "") != _MATCHER]
        completer.custom_matchers[:] = kept
    shell.configurables[:] = [one for one in shell.configurables if not _is_mine(one)]
    for table in (shell.magics_manager.registry, *shell.magics_manager.magics.values()):
        for name in [name for name, value in table.items() if _is_mine(getattr(value, "__self__", value))]:
            del table[name]


def _is_mine(one: object) -> bool:
    # By name: after a reload, an old instance has a different class.
    return (type(one).__name__, type(one).__module__) == ("ExtractMagics", __name__)
