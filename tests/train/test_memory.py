import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
if "keep" in sys.argv:
    from train.memory import keep_freed_memory
    assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (1 << 26)
before = faults()
for _ in range(4): b"x" * (1 << 26)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    def faults(*arguments):
        line = [sys.executable, "-c", PROGRAM, *arguments]
        return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)

    pages = 4 * (1 << 26) // 4096
    assert faults() > 0.9 * pages
    assert faults("keep") < 0.01 * pages
