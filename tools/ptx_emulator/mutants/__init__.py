"""How good is a test? Plants every single fault of many kinds in a recorded launch, and asks the emulator of each::

subject = mutants.Subject("gemm", record, outputs={"c": "bf16"})
right = subject.right()
verdicts = [mutants.judge(subject, one, right) for one in mutants.mutants(record)]
"""

from ptx_emulator.mutants.judge import Subject, Verdict, judge
from ptx_emulator.mutants.plant import Mutant, mutants

__all__ = ["Mutant", "Subject", "Verdict", "judge", "mutants"]
