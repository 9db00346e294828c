"""``manylora bench gpu-check``: one command tests and measures the GPU path within minutes.

``command.py`` imports no torch. It runs the sections of ``sections.py`` in a child process (``child.py``),
which returns rows. If the child fails, hangs or dies, only the section that was running is lost.
Without a GPU the same sections run with small sizes, on the CPU and under Triton's interpreter. This tests
the check itself. It needs torch, transformers and PEFT. If another package is missing, the sections that
need it say that they were skipped.
"""
