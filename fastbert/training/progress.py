"""Training shows its progress: as a bar in a terminal, and as an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS = 30.0  # between two lines if standard error is no terminal
# For each displayed value of a step: its label and its format.
SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "mlm_accuracy": ("mlm", "{:.1%}"),
    "nsp_accuracy": ("nsp", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "waiting": ("waiting", "{:.1%}"),
}


class Progress:
    """A `Progress` shows the completed steps on standard error, in a `with` statement or until `close`.

    total: the number of steps of the run. start: the number of completed steps. disabled: show nothing. seconds: the
    time between two lines if standard error is no terminal.
    """

    def __init__(self, total: int, start: int = 0, disabled: bool = False, *, seconds: float = SECONDS) -> None:
        self.total, self.disabled, self.seconds = total, disabled, seconds
        self.step = self._first = start
        self._began = self._shown = time.monotonic()
        self._bar: Any = None
        if not disabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc="Training", unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, step: int, **values: float | None) -> None:
        """Shows that `step` updates are completed. values: those with a name in `SHOWN` are displayed, except None.

        loss: in nats. mlm_accuracy, nsp_accuracy: shares of right predictions. tokens_per_second. waiting: the share of
        the time in which the device waited for data. A call without values keeps the last displayed ones.
        """
        done, self.step = step - self.step, step
        if self.disabled:
            return
        now = time.monotonic()
        if self._bar is not None:
            if values:
                self._bar.set_postfix_str(_words(values), refresh=False)
            self._bar.update(done)
        elif values and (now - self._shown >= self.seconds or step >= self.total):
            self._shown = now
            left = (now - self._began) / max(step - self._first, 1) * (self.total - step)
            line = f"step {step:,} of {self.total:,}: {_words(values)}, {duration(left)} left"
            print(line, file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Prints a line on standard error, above the bar."""
        if self.disabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self.disabled = True


def _words(values: dict[str, float | None]) -> str:
    shown = ((label, form, values.get(name)) for name, (label, form) in SHOWN.items())
    return ", ".join(f"{label} {form.format(value)}" for label, form, value in shown if value is not None)


def duration(seconds: float) -> str:
    """Formats a duration: 90 s as 1:30, and 3 h as 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
