"""The live line of a run, where there is no notebook to draw a figure in."""

import sys

from tqdm import tqdm

from flashlm_helpers.checkpoint import Progress


class TerminalLine:
    """The live line of a run on stderr: loss, learning rate, tokens per second and time left."""

    def __init__(self):
        # In a log file, which nobody watches, a line every half minute is enough.
        self.interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = None  # made at the first step: until then others write to the terminal

    def __call__(self, p: Progress) -> None:
        """Show the progress after a step."""
        if self.bar is None:
            self.bar = tqdm(
                total=1.0,
                bar_format="{percentage:3.0f}%|{bar:16}| {postfix}",
                file=sys.stderr,
                mininterval=self.interval,
            )
        parts = [f"loss {p.loss:.3f}"]
        if p.history.valid:
            parts.append(f"valid {p.history.valid[-1].nats_per_token:.3f}")
        line = (
            f"{', '.join(parts)} nats, lr {p.lr:.1e}, {p.tokens_per_second:,.0f} tokens/s, "
            f"{p.tokens_seen / 1e6:.2f} M tokens, {p.seconds_left:.0f} s left"
        )

        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(p.fraction - self.bar.n)
        if p.fraction >= 1:
            self.bar.close()
