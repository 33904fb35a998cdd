"""The figures that every peer's script prints of its update; imported from the folder of the script that runs."""

import json
import resource
import time


class Stopwatch:
    """Measures wall and processor time from its creation on."""

    def __init__(self):
        self.start, self.used = time.perf_counter(), time.process_time()

    def report(self, loss: float, grad_norm: float) -> None:
        """Prints the JSON object that bench_update reads: seconds, loss, gradient norm, peak resident memory."""
        figures = {
            "seconds": time.perf_counter() - self.start,
            "processor_s": time.process_time() - self.used,
            "loss": loss,
            "grad_norm": grad_norm,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps(figures))
