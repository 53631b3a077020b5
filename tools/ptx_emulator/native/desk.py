"""What a thread that runs CTAs has of its own: counters, findings, the trace, copies and products in flight."""

import weakref

import numpy as np

from ptx_emulator.core.spaces import Array
from ptx_emulator.native.encode import Encoder
from ptx_emulator.native.library import COUNTERS, FINDING_WORDS, MOST_FINDINGS, MOST_STEPS, Batch, library


class Desk:
    """A view of a batch for one thread: `base` says where everything is that belongs to single CTAs, or to none."""

    batch: Batch
    counted: Array  # COUNTERS, and FLOPs by kind
    findings: Array
    told: int  # how many of the findings the checker has
    traced: Array  # step -> instruction
    known: int  # how much of a machine's trace is there
    at: Array  # the block of each thread of a CTA whose threads are apart
    copies: int  # address of the copies in flight

    def __init__(self, base: Batch, encoder: Encoder) -> None:
        b = self.batch = Batch.from_buffer_copy(base)
        self.counted = np.zeros(len(COUNTERS) + len(encoder.kinds), np.int64)
        self.findings = np.zeros((MOST_FINDINGS, FINDING_WORDS), np.int32)
        self.told = 0
        self.traced = np.empty(MOST_STEPS, np.int32)
        self.traced[0] = 0
        self.known = 1
        self.at = np.zeros(b.threads, np.int32)
        b.counters, b.at = self.counted.ctypes.data, self.at.ctypes.data
        b.findings, b.most_findings = self.findings.ctypes.data, MOST_FINDINGS
        b.trace, b.most_steps = self.traced.ctypes.data, MOST_STEPS
        self.copies = b.copies = library().copies(b.ctas, b.threads)
        weakref.finalize(self, library().forget, self.copies)
        if encoder.alone:
            columns = np.array([2 * len(key) for key in encoder.keys], np.int32)
            b.products = library().products(len(encoder.watched), len(columns), columns.ctypes.data, b.threads)
            weakref.finalize(self, library().drop, b.products)

    def follow(self, trace: list[int]) -> None:
        """Bring a machine's trace to where the compiled machine reads it."""
        if len(trace) > len(self.traced):
            self.traced = np.resize(self.traced, 2 * len(trace))
            self.batch.trace, self.batch.most_steps = self.traced.ctypes.data, len(self.traced)
        if self.known < len(trace):
            self.traced[self.known : len(trace)] = trace[self.known :]
            self.known = len(trace)

    def news(self) -> Array:
        """The findings that the checker does not have, a row each."""
        rows = self.findings[self.told : self.batch.found]
        self.told = self.batch.found
        return rows

    def trace(self) -> list[int]:
        """The trace of the CTA that ran last."""
        steps: list[int] = self.traced[: self.batch.step + 1].tolist()
        return steps
