"""``manylora bench gpu-check``: proves and measures the GPU path in one command, within minutes.

``command.py`` (no torch) hands the sections of ``sections.py`` to a process of their own (``child.py``),
which may fail, hang or die without costing the others more than their time; what comes back are rows.
Without a GPU the same sections run small, on the CPU and under Triton's interpreter: that proves the check.
Needs torch, transformers and PEFT; whatever else is missing is a clear skip.
"""
