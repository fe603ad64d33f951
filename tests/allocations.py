"""What a call allocates, as torch's own profiler records it on the CPU."""

import gc
import itertools

from torch.profiler import ProfilerActivity, profile


def allocations(call):
    """(peak of live bytes, bytes of the largest single allocation) while the call runs."""
    gc.collect()  # what earlier tests left must not be freed, and counted, during the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert sizes
    return max(itertools.accumulate(sizes)), max(sizes)
