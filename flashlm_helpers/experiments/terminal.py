"""The live line of a run, where there is no notebook to draw a figure in."""

from tqdm import tqdm

from flashlm_helpers.checkpoint import Progress
from flashlm_helpers.machine.notices import LenientStream, notice

MANY_EPOCHS = 5  # more than these are worth a notice
ENOUGH_SHARE = 0.01  # of the budget, after which the speed of a run is known


class TerminalLine:
    """The live line of a run on stderr: loss, learning rate, tokens per second and time left.

    n_tokens: in the training text; where it is read many times, a notice says so.
    """

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens
        self.told = False

        # In a log file, which nobody watches, a line every half minute is enough.
        self.stream = LenientStream()
        self.interval = 0.5 if self.stream.isatty() else 30.0
        self.bar = None  # made at the first step: until then others write to the terminal

    def __call__(self, p: Progress) -> None:
        """Show the progress after a step."""
        if not self.told and p.fraction >= ENOUGH_SHARE:
            self.told = True
            epochs = p.tokens_seen / p.fraction / self.n_tokens
            if epochs > MANY_EPOCHS:
                notice(
                    f"the text will be read about {epochs:,.0f} times, and be known by heart "
                    "after a few: the model kept is the one that scores best on held-out text"
                )

        # The line itself; tqdm holds it back until it is time for another, however little was done
        # since (miniters): a resumed run begins with a leap, which is no measure of its steps.
        if self.bar is None:
            self.bar = tqdm(
                total=1.0,
                initial=p.fraction,
                miniters=0,
                bar_format="{percentage:3.0f}%|{bar:16}| {postfix}",
                file=self.stream,
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
