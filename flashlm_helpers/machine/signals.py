"""Requests to stop: Ctrl-C, a notebook's stop button, a closed terminal, and SIGTERM."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from flashlm_helpers.machine.notices import notice

ENDINGS = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK")  # those of them that the system has
SAME_REQUEST = 1.0  # seconds in which a second Ctrl-C is the first, passed on once more


@contextmanager
def handling(names: Sequence[str], handler: Callable) -> Iterator[None]:
    """Have `handler` called for signals of these names until the block ends.

    What is ignored stays ignored: nohup has a run go on when the terminal is closed. Outside of
    the main thread, where no handler may be set, nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            ignored = number is None or signal.getsignal(number) in (None, signal.SIG_IGN)
            if not ignored or name == "SIGINT":  # scripts ignore it in what they start with "&"
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextmanager
def stop_requests(rescue: Callable[[], None]) -> Iterator[list[float]]:
    """Collect the moments at which a signal asked to stop; Ctrl-C once more interrupts at once.

    rescue: called if the block ends with an exception of any kind, to save what there is.
    """
    requests: list[float] = []

    def note(number, frame):
        now = time.monotonic()
        if requests and number == signal.SIGINT and now - requests[0] > SAME_REQUEST:
            raise KeyboardInterrupt
        requests.append(now)
        if len(requests) == 1:
            notice("\nstopping after this step, then saving ...")

    with handling(("SIGINT", *ENDINGS), note):
        try:
            yield requests
        except BaseException:
            rescue()
            raise
